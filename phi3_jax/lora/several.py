"""Several adapters at once: weighted sums, and a batch in which each row uses another adapter."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, Int

from phi3_jax.config.lora import LoraConfig
from phi3_jax.lora.adapters import LoraEmbedding, LoraLinear, ResidualLora, TokenRows
from phi3_jax.lora.describe import described
from phi3_jax.lora.targets import checkpoint_name
from phi3_jax.lora.tree import ByLayer, Lora, Slice, unstacked
from phi3_jax.model.layers import dropout
from phi3_jax.system.dotted import flat_items, last_part, nested
from phi3_jax.system.errors import InputError

STACK = "model.layers."
EMBEDDING = "model.embed_tokens"


class Term(NamedTuple):
    """A plain adapter of one layer: weight · scale, A, B, and the bias on B."""

    scale: float
    a: np.ndarray
    b: np.ndarray
    bias: np.ndarray | None


def weighted_sum(
    loras: Sequence[Lora], weights: Sequence[float], combination_type: str = "cat", *, svd_rank: int | None = None
) -> Lora:
    """One plain adapter in place of several, as PEFT's `add_weighted_adapter`.

    **Arguments**
    - `weights`: one number for each adapter, of either sign.
    - `combination_type`: `"cat"`: A and B side by side, which is the exact sum Σ wᵢ sᵢ Bᵢ Aᵢ at the
      sum of the ranks. `"svd"`: the best approximation of that sum at `svd_rank` (default: the
      largest of the ranks). `"linear"`: A = Σ ±√|wᵢ sᵢ| Aᵢ and B = Σ √|wᵢ sᵢ| Bᵢ, a rough
      approximation at the common rank. Of a single adapter all three are its multiple, exactly.

    **Returns** an adapter of one rank (zeros where a module needs less) whose α is its rank, for every
    module and layer that has one in any of `loras`; dropout is that of the first. Starts that were
    taken out of the base (PiSSA, OLoRA) are part of the sum, so that it is for the untouched base.

    It differs from PEFT where PEFT's own result is not the sum: rsLoRA is off (PEFT keeps the
    first adapter's, which makes the sum √r times too large), biases on B are summed (PEFT leaves them
    zero), and layers are those of all the adapters (PEFT keeps the first one's `layers_to_transform`).

    Raises `InputError` where there is no such sum: for DoRA, LoftQ, trained token rows and
    `modules_to_save`, for a fused layer in one adapter and its slices in another, for ranks that differ
    with `"linear"`, and for adapters of different bases.
    """
    _check_weights(loras, weights)
    if combination_type not in ("cat", "linear", "svd"):
        raise InputError(f"combination_type is {combination_type!r}, expected 'cat', 'linear' or 'svd'")
    kind = combination_type if len(loras) > 1 else "linear"
    # Module -> layer -> terms, 0 standing for the only one outside the stack.
    found: dict[str, dict[int, list[Term]]] = {}
    ranks, depths = [], set()
    for lora, weight in zip(loras, weights, strict=True):
        _refuse_saved(lora, "in a weighted sum")
        depths |= {_num_layers(adapter) for name, adapter in lora.items() if name.startswith(STACK)}
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


def _layers(lora: Lora) -> Iterator[tuple[str, int, Any]]:
    """(module, layer, that layer's adapter), on the host."""
    for name, adapter in lora.items():
        layers = unstacked(adapter) if name.startswith(STACK) else [(0, jax.device_get(adapter))]
        for layer, own in layers:
            yield name, layer, own


def _num_layers(adapter: Any) -> int:
    return adapter.num_layers if isinstance(adapter, ByLayer) else jax.tree.leaves(adapter)[0].shape[0]


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


def _sum_config(loras: Sequence[Lora], found: Mapping[str, Mapping[int, Any]], rank: int, depth: int) -> LoraConfig:
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
    )
    names = (
        checkpoint_name(name, layer) if name.startswith(STACK) else name
        for name, layers in found.items()
        for layer in layers
    )
    return described(config, dict.fromkeys(names, (rank, rank)), depth)


def _term(name: str, weight: float, adapter: Any) -> Term:
    module = last_part(name)
    if isinstance(adapter, ResidualLora):
        if adapter.in_base:
            raise InputError(
                f"{module} starts from LoftQ, whose base is not that of other adapters; there is no weighted sum"
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
        _refuse_shapes(name, shapes)
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
    if name == EMBEDDING:
        return LoraEmbedding(a[0], b[0], 1.0)
    adapter = LoraLinear(a, b, 1.0, config.lora_dropout, bias if config.lora_bias else None)
    if not name.startswith(STACK):
        return jax.tree.map(lambda leaf: leaf[0], adapter)
    return adapter if len(layers) == depth else ByLayer((adapter,), (layers,), depth)


def _refuse_shapes(name: str, shapes: Iterable[tuple[int, ...]]) -> None:
    found = " and ".join(map(str, sorted(shapes)))
    raise InputError(f"the adapters of {last_part(name)} are for weights of {found}; give adapters of one base")


def _refuse_saved(lora: Lora, where: str) -> None:
    if lora.saved:
        raise InputError(
            f"modules_to_save has {', '.join(lora.saved)}, whole weights, which are not supported {where}; "
            "leave that adapter out"
        )


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LoraRows:
    """Adapters of which each row of a batch uses one; see `per_row`. The model takes it as it takes a `Lora`.

    **Fields**: `loras`; `rows`, for each row of the batch the place in `loras`, -1 for none.
    """

    loras: tuple[Lora, ...]
    rows: Int[Array, "batch"]

    @property
    def saved(self) -> dict[str, Array]:
        """Weights that take the place of the base's: none, since rows cannot part over them."""
        return {}

    def materialise(self) -> dict[str, Any]:
        """The adapters as the model takes them, see `Lora.materialise`."""
        found: dict[str, list[tuple[int, Any]]] = {}
        for index, lora in enumerate(self.loras):
            for name, adapter in flat_items(lora.materialise()):
                found.setdefault(name, []).append((index, adapter))
        return nested({name: _by_row(name, adapters, self.rows) for name, adapters in found.items()})


def per_row(loras: Sequence[Lora], rows: Int[ArrayLike, "batch"]) -> LoraRows:
    """Adapters for a batch in which each row uses another, as PEFT's `adapter_names`.

    `model(ids, lora=per_row([a, b], [0, 1, -1]))` runs the first row with `a`, the second with `b` and
    the third with the base alone. Another assignment of rows does not compile the model again. The
    adapters may differ in kind, targets and rank. Gradients go through to `loras`.

    **Arguments**: `rows`, for each row of the batch the place of its adapter in `loras`; -1 for none.

    Raises `InputError` without adapters, for those with `modules_to_save`, and for places that do not
    exist (unknown where `rows` is traced; then the base runs alone). A batch of another length raises
    it when the model is called.
    """
    if not loras:
        raise InputError("there are no adapters for the rows; give at least one, or leave lora out")
    for lora in loras:
        _refuse_saved(lora, "by row")
    rows = jnp.asarray(rows)
    if rows.ndim != 1 or not jnp.issubdtype(rows.dtype, jnp.integer):
        raise InputError(f"rows is {rows.dtype} of shape {rows.shape}, expected one whole number for each row")
    if not isinstance(rows, jax.core.Tracer):
        wrong = [row for row in rows.tolist() if not -1 <= row < len(loras)]
        if wrong:
            raise InputError(f"rows has {wrong[0]}, expected 0 to {len(loras) - 1} or -1 for the base alone")
    return LoraRows(tuple(loras), rows)


def _by_row(name: str, adapters: list[tuple[int, Any]], rows: Int[Array, "batch"]) -> "LinearRows | ChosenRows":
    owners, kinds = zip(*adapters, strict=True)
    if name.startswith(STACK):
        # The model's scan hands each layer its own slice of everything.
        rows = jnp.broadcast_to(rows, (jax.tree.leaves(kinds[0])[0].shape[0], *rows.shape))
    plain = all(isinstance(kind, LoraLinear) and kind.lora_bias is None for kind in kinds)
    if not plain or len({kind.dropout for kind in kinds}) > 1:
        return ChosenRows(kinds, rows, owners)
    shapes = {(*kind.lora_B.shape[:-1], kind.lora_A.shape[-1]) for kind in kinds}
    if len(shapes) > 1:
        _refuse_shapes(name, shapes)
    return LinearRows(
        jnp.concatenate([kind.lora_A for kind in kinds], axis=-2),
        jnp.concatenate([kind.lora_B for kind in kinds], axis=-1),
        rows,
        tuple(owner for owner, kind in adapters for _ in range(kind.rank)),
        tuple(kind.scaling for kind in kinds for _ in range(kind.rank)),
        kinds[0].dropout,
    )


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LinearRows:
    """Plain adapters of one linear layer side by side, as one of the sum of their ranks.

    What a row has of the ranks of other adapters than its own is masked, so that two matrix products do
    for all.

    **Fields**: `lora_A` `[*stack, R, in]`, `lora_B` `[*stack, out, R]`; `rows` as in `LoraRows`; `owners`
    and `scalings`, for each of the R ranks the adapter that it belongs to, and its scale.
    """

    lora_A: Float[Array, "*stack R in"]
    lora_B: Float[Array, "*stack out R"]
    rows: Int[Array, "*stack batch"]
    owners: tuple[int, ...] = field(metadata={"static": True})
    scalings: tuple[float, ...] = field(metadata={"static": True})
    dropout: float = field(metadata={"static": True})

    def __call__(self, y: Array, x: Array, weight: Array, key: jax.Array | None = None) -> Array:
        del weight
        mine = _rows_like(self.rows, y) == np.asarray(self.owners)  # [batch, 1, R]
        down = dropout(x.astype(self.lora_A.dtype), self.dropout, key) @ self.lora_A.T
        scales = np.asarray(self.scalings, down.dtype)
        return (y + (down * jnp.where(mine, scales, 0)) @ self.lora_B.T).astype(y.dtype)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ChosenRows:
    """Adapters of any kinds of one module: each is computed for the whole batch, and of the results each row
    takes its own.

    **Fields**: `adapters`; `rows` as in `LoraRows`; `owners`, the places of `adapters` in `LoraRows.loras`.
    """

    adapters: tuple[Any, ...]
    rows: Int[Array, "*stack batch"]
    owners: tuple[int, ...] = field(metadata={"static": True})

    def __call__(self, y: Array, *inputs: Any) -> Array:
        """The layer's output, or the embedding's rows; `inputs` is what these kinds of adapter take."""
        return self._chosen(y, lambda adapter: adapter(y, *inputs))

    def tied_logits(self, logits: Array, x: Array) -> Array:
        """See `EmbeddingAdapter`."""
        return self._chosen(logits, lambda adapter: adapter.tied_logits(logits, x))

    def _chosen(self, y: Array, run: Callable[[Any], Array]) -> Array:
        rows, chosen = _rows_like(self.rows, y), y
        for owner, adapter in zip(self.owners, self.adapters, strict=True):
            chosen = jnp.where(rows == owner, run(adapter), chosen)
        return chosen


def _rows_like(rows: Int[Array, "batch"], y: Float[Array, "batch *rest"]) -> Int[Array, "batch *ones"]:
    if rows.shape[0] != y.shape[0]:
        raise InputError(f"rows has {rows.shape[0]} entries for a batch of {y.shape[0]} rows; give one for each row")
    return rows.reshape(-1, *(1 for _ in y.shape[1:]))
