"""Adapters for programs that read no more of PEFT's configuration than `r` and `lora_alpha` (vLLM, llama.cpp)."""

from collections.abc import Mapping
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np

from phi3_jax.config.lora import LoraConfig
from phi3_jax.lora.adapters import AnyAdapter, LoraLinear
from phi3_jax.lora.stack import rescaled
from phi3_jax.lora.targets import checkpoint_names
from phi3_jax.lora.tree import Lora
from phi3_jax.peft.tensors import to_peft
from phi3_jax.system.dotted import last_part
from phi3_jax.system.errors import InputError


def portable(lora: Lora, num_layers: int) -> Lora:
    """The same update as plain LoRA of one rank and of scale 1, on whole layers, in every layer.

    Slices become one adapter of their fused layer, PiSSA's start is subtracted, ranks are filled up
    with zeros to the largest, scales (rsLoRA's too) move into B, and layers without an adapter get one
    of zeros. `r` and `lora_alpha` are equal, so that every rule for the scale gives 1, but that of rsLoRA,
    which is off.

    Args:
        lora: The adapter.
        num_layers: Of the base.

    Raises:
        InputError: Naming all that such programs have no place for: DoRA, `lora_bias`, `modules_to_save`, trained
            token rows, adapters of the embedding.
    """
    modules, config, _ = to_peft(lora)
    plain = _plain(modules, lora, config)
    rank = max(adapter.rank for adapter in plain.values())
    wide = {name: rescaled(adapter, 1.0, rank) for name, adapter in plain.items()}
    items: dict[str, LoraLinear] = {}
    for name in {_stacked_name(full): None for full in wide}:
        found = [wide.get(full) for full in checkpoint_names(name, num_layers)]
        like = next(adapter for adapter in found if adapter is not None)
        zeros = jax.tree.map(np.zeros_like, like)
        layers = [zeros if adapter is None else adapter for adapter in found]
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers) if name.startswith("model.layers.") else like
        items[name] = replace(stacked, dropout=config.lora_dropout)
    described = LoraConfig(
        r=rank,
        lora_alpha=rank,
        lora_dropout=config.lora_dropout,
        target_modules=tuple(sorted({last_part(name) for name in items})),
        base_model_name_or_path=config.base_model_name_or_path,
        revision=config.revision,
    )
    return Lora.from_items(items, described)


def _stacked_name(full: str) -> str:
    """The name in the pytree of a module that checkpoints call `full`."""
    head, separator, tail = full.partition("model.layers.")
    return full if head or not separator else f"model.layers.{tail.partition('.')[2]}"


def _plain(modules: Mapping[str, AnyAdapter], lora: Lora, config: LoraConfig) -> dict[str, LoraLinear]:
    """The adapters, which are plain LoRA all of them. Raises `InputError` where they are not."""
    others = sorted({last_part(name) for name, adapter in modules.items() if not isinstance(adapter, LoraLinear)})
    found = {
        "use_dora": config.use_dora,
        "lora_bias": config.lora_bias,
        f"modules_to_save ({', '.join(lora.saved)})": bool(lora.saved),
        f"adapters or token rows of {', '.join(others)}": bool(others) and not config.use_dora,
    }
    features = [name for name, there in found.items() if there]
    if features:
        raise InputError(
            f"the adapter has {'; '.join(features)}, for which a portable adapter has no place; merge it into the base "
            "(export --merge)"
        )
    return {name: adapter for name, adapter in modules.items() if isinstance(adapter, LoraLinear)}
