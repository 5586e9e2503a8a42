"""Weighted sums of adapters: one plain adapter in place of several."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from phi3_jax.config.lora import LoraConfig
from phi3_jax.lora.adapters import AnyAdapter, LoraEmbedding, LoraLinear, ResidualLora, TokenRows
from phi3_jax.lora.describe import described
from phi3_jax.lora.stack import STACK, ByLayer, num_layers, unstacked
from phi3_jax.lora.targets import checkpoint_name
from phi3_jax.lora.tree import Lora, Slice, refuse_saved, refuse_shapes
from phi3_jax.system.dotted import last_part
from phi3_jax.system.errors import InputError

EMBEDDING = "model.embed_tokens"


class Term(NamedTuple):
    """A plain adapter of one layer: weight · scale, A, B, and the bias on B."""

    scale: float
    a: Float[np.ndarray, "r in"]
    b: Float[np.ndarray, "out r"]
    bias: Float[np.ndarray, "out"] | None


def weighted_sum(
    loras: Sequence[Lora], weights: Sequence[float], combination_type: str = "cat", *, svd_rank: int | None = None
) -> Lora:
    """One plain adapter in place of several, as PEFT's `add_weighted_adapter`.

    It differs from PEFT where PEFT's own result is not the sum: rsLoRA is off (PEFT keeps the
    first adapter's, which makes the sum √r times too large), biases on B are summed (PEFT leaves them
    zero), and layers are those of all the adapters (PEFT keeps the first one's `layers_to_transform`).

    Args:
        loras: At least one.
        weights: One number for each adapter, of either sign.
        combination_type: `"cat"`: A and B side by side, which is the exact sum Σ wᵢ sᵢ Bᵢ Aᵢ at the sum of
            the ranks. `"svd"`: the best approximation of that sum at `svd_rank`. `"linear"`:
            A = Σ ±√|wᵢ sᵢ| Aᵢ and B = Σ √|wᵢ sᵢ| Bᵢ, a rough approximation at the common rank. Of a
            single adapter all three are its multiple, exactly.
        svd_rank: With `"svd"`; None: the largest of the ranks.

    Returns:
        An adapter of one rank (zeros where a module needs less) whose α is its rank, for every module and
        layer that has one in any of `loras`; dropout is that of the first. What was taken out of the base at
        the start (PiSSA, OLoRA) is part of the sum, so that it is for the untouched base.

    Raises:
        InputError: Where there is no such sum: for DoRA, LoftQ, trained token rows and `modules_to_save`,
            for a fused layer in one adapter and its slices in another, for ranks that differ with
            `"linear"`, and for adapters of different bases.

    Example:
        >>> adapter = LoraLinear(jnp.ones((2, 1, 4)), jnp.ones((2, 4, 1)), scaling=2.0)
        >>> config = LoraConfig(r=1, lora_alpha=2, target_modules=["o_proj"])
        >>> lora = Lora.from_items({"model.layers.self_attn.o_proj": adapter}, config)
        >>> both = weighted_sum([lora, lora], [0.25, 0.5])
        >>> both.config.r, float(both.adapters["model"]["layers"]["self_attn"]["o_proj"].delta()[0, 0, 0])
        (2, 1.5)
    """
    _check_weights(loras, weights)
    if combination_type not in ("cat", "linear", "svd"):
        raise InputError(f"combination_type is {combination_type!r}, expected 'cat', 'linear' or 'svd'")
    kind = combination_type if len(loras) > 1 else "linear"
    # Module -> layer -> terms, 0 standing for the only one outside the stack.
    found: dict[str, dict[int, list[Term]]] = {}
    ranks, depths = [], set()
    for lora, weight in zip(loras, weights, strict=True):
        refuse_saved(lora, "in a weighted sum")
        depths |= {num_layers(adapter) for name, adapter in lora.items() if name.startswith(STACK)}
        terms = [(name, layer, _term(name, float(weight), own)) for name, layer, own in _layers(lora)]
        ranks.append(max(len(term.a) for _, _, term in terms))
        for name, layer, term in terms:
            found.setdefault(name, {}).setdefault(layer, []).append(term)
    if len(depths) > 1:
        raise InputError(f"the adapters are for bases of {min(depths)} and of {max(depths)} layers; give those of one")
    slices = {name: part for lora in loras for name, part in lora.slices.items()}
    _check_slices(found, slices)
    rank, depth = _sum_rank(ranks, kind, svd_rank), max(depths, default=0)
    config = _sum_config(loras, found, rank, depth)
    sums = {name: [_sum(name, terms, kind, rank) for _, terms in sorted(own.items())] for name, own in found.items()}
    adapters = {name: _adapter(name, sums[name], tuple(sorted(found[name])), config, depth) for name in found}
    return Lora.from_items(adapters, config, slices=slices)


def _check_weights(loras: Sequence[Lora], weights: Sequence[float]) -> None:
    if not loras:
        raise InputError("there are no adapters to sum; give at least one")
    if len(weights) != len(loras):
        raise InputError(f"there are {len(weights)} weights for {len(loras)} adapters; give one for each")
    wrong = [weight for weight in weights if not math.isfinite(weight)]
    if wrong:
        raise InputError(f"the weights have {wrong[0]}, expected finite numbers")


def _layers(lora: Lora) -> Iterator[tuple[str, int, AnyAdapter]]:
    """(module, layer, that layer's adapter), on the host."""
    for name, adapter in lora.items():
        layers = unstacked(adapter) if name.startswith(STACK) else [(0, jax.device_get(adapter))]
        for layer, own in layers:
            yield name, layer, own


def _sum_rank(ranks: Sequence[int], kind: str, svd_rank: int | None) -> int:
    if svd_rank is not None and (kind != "svd" or svd_rank < 1):
        raise InputError(f"svd_rank is {svd_rank} with combination_type {kind!r}, expected at least 1 with 'svd' alone")
    if kind == "linear" and len(set(ranks)) > 1:
        raise InputError(
            f"combination_type 'linear' needs adapters of one rank, but theirs are {', '.join(map(str, ranks))}; "
            "give 'cat' or 'svd'"
        )
    if kind == "svd":
        return svd_rank or max(ranks)
    return sum(ranks) if kind == "cat" else ranks[0]


def _check_slices(names: Iterable[str], slices: Mapping[str, Slice]) -> None:
    both = [part for part in slices.values() if part.parent in names]
    if both:
        raise InputError(
            f"{last_part(both[0].parent)} has an adapter, and in another so has {last_part(both[0].name)}, a slice of "
            "it; such a sum is not supported"
        )


def _sum_config(
    loras: Sequence[Lora], found: Mapping[str, Mapping[int, list[Term]]], rank: int, depth: int
) -> LoraConfig:
    first = loras[0].config
    biased = any(lora.config.lora_bias for lora in loras)
    if biased and EMBEDDING in found:
        raise InputError("lora_bias in one adapter and embed_tokens in another have no sum in PEFT; leave one out")
    config = LoraConfig(
        r=rank,
        lora_alpha=rank,
        lora_dropout=first.lora_dropout,
        lora_bias=biased,
        base_model_name_or_path=first.base_model_name_or_path,
        revision=first.revision,
    )
    names = (
        checkpoint_name(name, layer) if name.startswith(STACK) else name
        for name, layers in found.items()
        for layer in layers
    )
    return described(config, dict.fromkeys(names, (rank, rank)), depth)


def _term(name: str, weight: float, adapter: AnyAdapter) -> Term:
    module = last_part(name)
    if isinstance(adapter, ResidualLora):
        if adapter.in_base:
            raise InputError(
                f"{module} was initialised by LoftQ, whose base is not that of other adapters; there is no weighted sum"
            )
        adapter = adapter.as_plain()
    if not isinstance(adapter, LoraLinear | LoraEmbedding):
        what = "trained token rows" if isinstance(adapter, TokenRows) else "a DoRA adapter"
        raise InputError(f"{module} has {what}, of which there is no weighted sum; leave that adapter out")
    bias = getattr(adapter, "lora_bias", None)
    a, b = (np.asarray(leaf, np.float32) for leaf in (adapter.lora_A, adapter.lora_B))
    return Term(weight * adapter.scaling, a, b, None if bias is None else np.asarray(bias, np.float32))


def _sum(name: str, terms: list[Term], kind: str, rank: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A and B at `rank`, and the bias on B, of a scale of 1."""
    shapes = {(term.b.shape[0], term.a.shape[1]) for term in terms}
    if len(shapes) > 1:
        refuse_shapes(name, shapes)
    if kind == "linear":
        a, b = _linear(name, terms)
    else:
        # As PEFT has it, A takes weight and scale.
        a = np.concatenate([np.float32(term.scale) * term.a for term in terms])
        b = np.concatenate([term.b for term in terms], axis=1)
        if kind == "svd":
            a, b = _truncated(a, b, rank)
    more = rank - len(a)
    bias = np.zeros(len(b), np.float32)
    for term in terms:
        if term.bias is not None:
            bias += np.float32(term.scale) * term.bias
    return np.pad(a, [(0, more), (0, 0)]), np.pad(b, [(0, 0), (0, more)]), bias


def _linear(name: str, terms: list[Term]) -> tuple[np.ndarray, np.ndarray]:
    ranks = sorted({len(term.a) for term in terms})
    if len(ranks) > 1:
        raise InputError(
            f"combination_type 'linear' needs one rank, but {last_part(name)} has {' and '.join(map(str, ranks))}; "
            "give 'cat' or 'svd'"
        )
    roots = [np.float32(math.sqrt(abs(term.scale))) for term in terms]
    # The sign on one side alone: on both it would be lost.
    a = sum(math.copysign(1, term.scale) * root * term.a for root, term in zip(roots, terms, strict=True))
    b = sum(root * term.b for root, term in zip(roots, terms, strict=True))
    return np.asarray(a, np.float32), np.asarray(b, np.float32)


def _truncated(a: np.ndarray, b: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """Vᵀ and U S of the largest singular values of B A, without ever making that product."""
    left, upper_b = np.linalg.qr(b.astype(np.float64))
    right, upper_a = np.linalg.qr(a.T.astype(np.float64))
    u, s, vh = np.linalg.svd(upper_b @ upper_a.T)
    kept = min(rank, len(s))
    new_a, new_b = vh[:kept] @ right.T, left @ (u[:, :kept] * s[:kept])
    return new_a.astype(np.float32), new_b.astype(np.float32)


def _adapter(
    name: str, sums: Sequence[tuple[np.ndarray, ...]], layers: tuple[int, ...], config: LoraConfig, depth: int
) -> LoraLinear | LoraEmbedding | ByLayer:
    """The adapter of a module whose `layers` have these A, B and biases."""
    a, b, bias = (jnp.asarray(np.stack(arrays)) for arrays in zip(*sums, strict=True))
    in_stack = name.startswith(STACK)
    if not in_stack:
        a, b, bias = a[0], b[0], bias[0]
    if name == EMBEDDING:
        return LoraEmbedding(a, b, 1.0)
    adapter = LoraLinear(a, b, 1.0, config.lora_dropout, bias if config.lora_bias else None)
    return adapter if not in_stack or len(layers) == depth else ByLayer((adapter,), (layers,), depth)
