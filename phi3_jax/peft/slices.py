"""Adapters of fused layers in PEFT's files that are made of slices, and how they are told.

By the form of B (`find_blocks`), and in our own files by a record in the metadata, which PEFT does not
read: for columns that are still zero, and for the α that each slice had. Where the record does not
fit what else is in the file, as after somebody changed `lora_alpha`, it does not count. Either way the
function computed is the same.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TypedDict, TypeGuard

from phi3_jax.config.lora import LoraConfig
from phi3_jax.lora.adapters import AnyAdapter, DoraEmbedding, LoraEmbedding, TokenRows
from phi3_jax.lora.describe import RankAndAlpha, alpha_of
from phi3_jax.lora.fused import Plain, find_blocks, fits, slice_table, split
from phi3_jax.lora.targets import checkpoint_names
from phi3_jax.lora.tree import Slice
from phi3_jax.model import Phi3ForCausalLM
from phi3_jax.system.dotted import last_part, sibling
from phi3_jax.system.reading import parse_json

ENTRY = "phi3_jax"  # of the file's metadata

Product = Plain | LoraEmbedding | DoraEmbedding  # of A and B, as PEFT has them
Blocks = list[tuple[Slice, int, float]]  # slices of a fused layer, each with its r and α
Parts = Mapping[str, tuple[int, float]]  # (r, α) by the last part of a slice's name


class Record(TypedDict):
    """The entry: the usual r and α, and the slices of each fused layer by its name in a checkpoint."""

    r: int
    lora_alpha: float
    slices: dict[str, Parts]


def has_rank(adapter: AnyAdapter) -> TypeGuard[Product]:
    """Whether it is a product of A and B, as all are but trained rows."""
    return not isinstance(adapter, TokenRows)


def rank_and_alpha(config: LoraConfig, name: str, adapter: Product) -> RankAndAlpha:
    """r and α of an adapter of one layer: the configuration's α where that gives the adapter's scale."""
    r, alpha = adapter.lora_A.shape[-2], config.rank_and_alpha(name)[1]
    if config.scaling_of(r, alpha) != adapter.scaling:
        alpha = alpha_of(config, adapter.scaling, r)
    return r, alpha


def slice_record(config: LoraConfig, parts: Mapping[str, Sequence[tuple[Slice, Plain]]]) -> dict[str, str]:
    """The metadata that says of which slices adapters of fused layers are made; none where there are none.

    Args:
        config: Of all of them.
        parts: For each fused layer's name in a checkpoint the adapters of its slices.
    """
    record = {
        whole: {last_part(rows.name): rank_and_alpha(config, sibling(whole, rows.name), one) for rows, one in found}
        for whole, found in parts.items()
    }
    entry = {"r": config.r, "lora_alpha": config.lora_alpha, "slices": record}
    return {ENTRY: json.dumps(entry, separators=(",", ":"))} if parts else {}


def split_slices(
    model: Phi3ForCausalLM, config: LoraConfig, modules: Mapping[str, AnyAdapter], metadata: Mapping[str, str]
) -> tuple[dict[str, AnyAdapter], dict[str, RankAndAlpha], LoraConfig]:
    """The adapters of a file, with those of slices on their own.

    Args:
        model: The base.
        config: What adapter_config.json says.
        modules: Adapters of one layer by the names that checkpoints have.
        metadata: Of the file.

    Returns:
        The adapters; (r, α) of each; the configuration with their usual r and α.
    """
    record = _read(metadata)
    ranks = {name: config.rank_and_alpha(name) for name, one in modules.items() if has_rank(one)}
    modules = dict(modules)
    by_parent: dict[str, list[Slice]] = {}
    for part in slice_table(model).values():
        by_parent.setdefault(part.parent, []).append(part)
    for parent, parts in by_parent.items():
        names = checkpoint_names(parent, model.config.num_hidden_layers)
        wholes = {name: one for name in names if isinstance(one := modules.get(name), Plain)}
        recorded = {} if record is None else _recorded(config, wholes, parts, record["slices"])
        for whole, found in (recorded or _found(config, wholes, parts)).items():
            del ranks[whole], modules[whole]
            scaled = [(part, r, config.scaling_of(r, alpha)) for part, r, alpha in found]
            for (part, r, alpha), adapter in zip(found, split(wholes[whole], scaled), strict=True):
                name = sibling(whole, part.name)
                modules[name], ranks[name] = adapter, (r, alpha)
    if record is not None:
        config = replace(config, r=record["r"], lora_alpha=record["lora_alpha"])
    return modules, ranks, config


def _found(config: LoraConfig, wholes: Mapping[str, Plain], parts: Sequence[Slice]) -> dict[str, Blocks]:
    """What the slices are by the form of B: in all layers, or nowhere."""
    blocks: dict[str, Blocks] = {}
    for rank in {whole.rank for whole in wholes.values()}:
        alike = {name: whole for name, whole in wholes.items() if whole.rank == rank}
        found = find_blocks(list(alike.values()), parts)
        if found is None:
            return {}
        for name, whole in alike.items():
            blocks[name] = [(part, r, alpha_of(config, whole.scaling, r)) for part, r in found]
    return blocks


def _recorded(
    config: LoraConfig, wholes: Mapping[str, Plain], parts: Sequence[Slice], record: Mapping[str, Parts]
) -> dict[str, Blocks]:
    """What the slices are by the record, if that fits all of the adapters."""
    blocks: dict[str, Blocks] = {}
    for name, whole in wholes.items():
        entry = record.get(name)
        if not entry:
            continue
        found = [(part, *entry[last_part(part.name)]) for part in parts if last_part(part.name) in entry]
        if not fits(whole, [(part, r) for part, r, _ in found]):
            return {}
        scales = {config.scaling_of(r, alpha) for _, r, alpha in found}
        # Scales that differed were moved into B, and 1 left.
        scaling = scales.pop() if len(scales) == 1 else 1.0
        if 0 in scales or not math.isclose(scaling, whole.scaling, rel_tol=1e-12):
            return {}
        blocks[name] = found
    return blocks


def _read(metadata: Mapping[str, str]) -> Record | None:
    """Our entry of the metadata; nothing where there is none, or none that makes sense."""
    try:
        entry = parse_json(metadata.get(ENTRY, "{}"))
        if not entry:
            return None
        LoraConfig(r=entry["r"], lora_alpha=entry["lora_alpha"])
        for found in entry["slices"].values():
            for r, alpha in found.values():
                LoraConfig(r=r, lora_alpha=alpha)
    except (ValueError, TypeError, KeyError, AttributeError):
        return None
    record: Record = entry
    return record
