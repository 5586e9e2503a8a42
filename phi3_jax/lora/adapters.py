"""The kinds of adapter.

An adapter is a small pytree: its arrays are leaves, its scale and dropout static. The adapter of a
stacked layer holds stacked arrays, `[L, r, in]`; the model slices it as it slices the weights.

Each kind says what it makes of a layer's output (the call), and what the layer's weight becomes when
base and adapter are made one (`merged`, in float32) and parted again (`unmerged`).
"""

from dataclasses import dataclass, field, replace
from typing import Any, Self

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from phi3_jax.lora.low_rank import add_low_rank
from phi3_jax.model.layers import dropout, dropped, look_up
from phi3_jax.model.products import precise_matmul, project
from phi3_jax.parallel.sharding import constrain
from phi3_jax.system.errors import InputError


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LoraLinear:
    """y + s · (dropout(x) Aᵀ Bᵀ + bias), in the type of x, summed in float32; see `add_low_rank`.

    **Fields**: `lora_A` `[*stack, r, in]`, `lora_B` `[*stack, out, r]`, `scaling` (s), `dropout`,
    `lora_bias` `[*stack, out]` or None.
    """

    lora_A: Float[Array, "*stack r in"]
    lora_B: Float[Array, "*stack out r"]
    scaling: float = field(metadata={"static": True})
    dropout: float = field(default=0.0, metadata={"static": True})
    lora_bias: Float[Array, "*stack out"] | None = None

    def __call__(self, y: Array, x: Array, weight: Array, key: jax.Array | None = None) -> Array:
        del weight  # a plain update does not look at the base
        kept, keep_scale = dropped(x, self.dropout, key)
        y = add_low_rank(y, kept, self.lora_A, self.lora_B, self.scaling * keep_scale)
        return y if self.lora_bias is None else (y + self.lora_bias * self.scaling).astype(y.dtype)

    def part(self, rows: slice) -> Self:
        """What it adds to these rows of the output."""
        bias = None if self.lora_bias is None else self.lora_bias[..., rows]
        return replace(self, lora_B=_rows_at_work(self.lora_B, rows), lora_bias=bias)

    def update(self, x: Float[Array, "*batch in"]) -> Float[Array, "*batch out"]:
        """x Aᵀ Bᵀ + bias, not yet scaled."""
        update = (x @ self.lora_A.T) @ self.lora_B.T
        return update if self.lora_bias is None else update + self.lora_bias

    def merged(self, weight: Float[Array, "out in"]) -> Float[Array, "out in"]:
        """W + s · B A. Raises `InputError` where B has a bias, for which Phi-3's layers have no place."""
        self._refuse_bias()
        return weight.astype(jnp.float32) + self.delta()

    def unmerged(self, weight: Float[Array, "out in"]) -> Float[Array, "out in"]:
        """W - s · B A."""
        self._refuse_bias()
        return weight.astype(jnp.float32) - self.delta()

    def delta(self) -> Float[Array, "out in"]:
        """s · B A, in float32."""
        return self.scaling * precise_matmul(self.lora_B, self.lora_A)

    def rescaled(self, scaling: float, rank: int) -> Self:
        """The same update with another scale, and zeros in A and B up to another rank.

        They stay zero in training: the gradient of either is a product with the other.
        """
        factor = _ratio(self.scaling, scaling)
        bias = None if self.lora_bias is None else self.lora_bias * factor
        a, b = _padded(self.lora_A, self.lora_B, rank)
        return replace(self, lora_A=a, lora_B=b * factor, lora_bias=bias, scaling=scaling)

    @property
    def rank(self) -> int:
        return self.lora_A.shape[-2]

    def _refuse_bias(self) -> None:
        if self.lora_bias is not None:
            raise InputError("an adapter with lora_bias cannot be merged: Phi-3's layers have no bias; keep it beside")


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ResidualLora:
    """LoRA whose start (A0, B0) was taken out of the base: y + s · (x Aᵀ Bᵀ - x A0ᵀ B0ᵀ).

    PiSSA and OLoRA subtract s · B0 A0 from the base's weight. Here the base stays what it is and the
    start rides along, so that nothing is rounded, and the update of the untouched base is always at
    hand. LoftQ quantises W - s · B0 A0, so there the start is out of the base already (`in_base`).

    **Fields**: `lora`, what trains; `start_A` and `start_B`, what it was at the start.
    """

    lora: LoraLinear
    start_A: Float[Array, "*stack r in"]
    start_B: Float[Array, "*stack out r"]
    in_base: bool = field(default=False, metadata={"static": True})

    @property
    def scaling(self) -> float:
        return self.lora.scaling

    @property
    def rank(self) -> int:
        return self.lora.rank

    @property
    def start(self) -> LoraLinear:
        """The start as an adapter of its own, its arrays constants."""
        a, b = jax.lax.stop_gradient((self.start_A, self.start_B))
        return LoraLinear(a, b, self.scaling)

    def __call__(self, y: Array, x: Array, weight: Array, key: jax.Array | None = None) -> Array:
        if not self.in_base:
            # Not rounded to the output's type in between: start and update are large and nearly equal.
            wide = x.astype(self.start_A.dtype)
            return self.lora(y - self.start.update(wide) * self.scaling, x, weight, key).astype(y.dtype)
        return self.lora(y, x, weight, key)

    def part(self, rows: slice) -> Self:
        return replace(self, lora=self.lora.part(rows), start_B=_rows_at_work(self.start_B, rows))

    def as_plain(self) -> LoraLinear:
        """One plain adapter of twice the rank for the untouched base: A' = [A; A0], B' = [B, -B0]."""
        a = jnp.concatenate([self.lora.lora_A, self.start_A], axis=-2)
        b = jnp.concatenate([self.lora.lora_B, -self.start_B], axis=-1)
        return replace(self.lora, lora_A=a, lora_B=b)

    def merged(self, weight: Float[Array, "out in"]) -> Float[Array, "out in"]:
        """W + s · (B A - B0 A0), W the untouched base. At the start that is W, to the last bit."""
        return weight.astype(jnp.float32) + self._delta()

    def unmerged(self, weight: Float[Array, "out in"]) -> Float[Array, "out in"]:
        return weight.astype(jnp.float32) - self._delta()

    def _delta(self) -> Float[Array, "out in"]:
        # The scale comes last: each product scaled in the same instruction as subtracted, they would not cancel.
        lora = self.lora
        return self.scaling * (precise_matmul(lora.lora_B, lora.lora_A) - precise_matmul(self.start_B, self.start_A))

    def rescaled(self, scaling: float, rank: int) -> Self:
        start = LoraLinear(self.start_A, self.start_B, self.scaling).rescaled(scaling, rank)
        return replace(self, lora=self.lora.rescaled(scaling, rank), start_A=start.lora_A, start_B=start.lora_B)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DoraLinear:
    """DoRA: x W'ᵀ with W' = m ⊙ V / ‖V‖, V = W + s · B A, norms of rows.

    As the paper's section 4.3 has it, no gradient goes through the norm. With dropout the adapted
    part sees the dropped input, the base the whole one, as in PEFT.

    **Fields**: those of `LoraLinear`, and `magnitude` (m) `[*stack, out]`.
    """

    lora_A: Float[Array, "*stack r in"]
    lora_B: Float[Array, "*stack out r"]
    magnitude: Float[Array, "*stack out"]
    scaling: float = field(metadata={"static": True})
    dropout: float = field(default=0.0, metadata={"static": True})

    def __call__(self, y: Array, x: Array, weight: Array, key: jax.Array | None = None) -> Array:
        wide = x.astype(self.lora_A.dtype)
        factor = self._factor(weight.astype(wide.dtype))
        base = y
        if key is not None and self.dropout:
            wide = dropout(wide, self.dropout, key)
            base = project(wide, weight.astype(wide.dtype))
        update = (wide @ self.lora_A.T) @ self.lora_B.T * self.scaling
        return (y + (factor - 1) * base + factor * update).astype(y.dtype)

    def part(self, rows: slice) -> Self:
        return replace(self, lora_B=_rows_at_work(self.lora_B, rows), magnitude=self.magnitude[..., rows])

    def _factor(self, weight: Float[Array, "out in"]) -> Float[Array, "out"]:
        """m / ‖V‖."""
        norm = jnp.linalg.norm(weight + self._delta().astype(weight.dtype), axis=1)
        return self.magnitude / jax.lax.stop_gradient(norm)

    def _delta(self) -> Float[Array, "out in"]:
        return self.scaling * precise_matmul(self.lora_B, self.lora_A)

    def merged(self, weight: Float[Array, "out in"]) -> Float[Array, "out in"]:
        """m ⊙ V / ‖V‖."""
        wide = weight.astype(jnp.float32)
        return self._factor(wide)[:, None] * (wide + self._delta())

    def unmerged(self, weight: Float[Array, "out in"]) -> Float[Array, "out in"]:
        """Raises `InputError`: the norm that was divided by cannot be told from the merged weight."""
        raise InputError("a DoRA adapter cannot be taken out of a merged weight, whose norm is lost; keep the base")

    @property
    def rank(self) -> int:
        return self.lora_A.shape[-2]

    def rescaled(self, scaling: float, rank: int) -> Self:
        a, b = _padded(self.lora_A, self.lora_B, rank)
        return replace(self, lora_A=a, lora_B=b * _ratio(self.scaling, scaling), scaling=scaling)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LoraEmbedding:
    """E[ids] + s · A[:, ids]ᵀ Bᵀ; no dropout, as in PEFT and loralib.

    As in PEFT, A's column of the padding token gets no gradient.

    **Fields**: `lora_A` `[r, vocab]`, `lora_B` `[hidden, r]`, `scaling` (s).
    """

    lora_A: Float[Array, "r vocab"]
    lora_B: Float[Array, "hidden r"]
    scaling: float = field(metadata={"static": True})

    def __call__(self, rows: Array, ids: Array, table: Array, padding_idx: int | None) -> Array:
        del table
        return (rows + self.update(ids, padding_idx) * self.scaling).astype(rows.dtype)

    def update(self, ids: Array, padding_idx: int | None) -> Array:
        """A[:, ids]ᵀ Bᵀ, not yet scaled."""
        return look_up(self.lora_A.T, ids, padding_idx) @ self.lora_B.T

    def tied_logits(self, logits: Array, x: Array) -> Array:
        """The logits of a head that shares the table: as they are, since PEFT adapts the look-up alone."""
        del x
        return logits

    def merged(self, weight: Float[Array, "vocab hidden"]) -> Float[Array, "vocab hidden"]:
        """E + s · (B A)ᵀ."""
        return weight.astype(jnp.float32) + self._delta()

    def unmerged(self, weight: Float[Array, "vocab hidden"]) -> Float[Array, "vocab hidden"]:
        """E - s · (B A)ᵀ."""
        return weight.astype(jnp.float32) - self._delta()

    def _delta(self) -> Array:
        return self.scaling * precise_matmul(self.lora_A.T, self.lora_B.T)

    def rescaled(self, scaling: float, rank: int) -> Self:
        a, b = _padded(self.lora_A, self.lora_B, rank)
        return replace(self, lora_A=a, lora_B=b * _ratio(self.scaling, scaling), scaling=scaling)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DoraEmbedding:
    """DoRA on a table: m ⊙ V[ids] / ‖V‖, V = E + s · (B A)ᵀ, norms of columns, no gradient through them.

    **Fields**: those of `LoraEmbedding`, and `magnitude` (m) `[hidden]`.
    """

    lora_A: Float[Array, "r vocab"]
    lora_B: Float[Array, "hidden r"]
    magnitude: Float[Array, "hidden"]
    scaling: float = field(metadata={"static": True})

    @property
    def plain(self) -> LoraEmbedding:
        return LoraEmbedding(self.lora_A, self.lora_B, self.scaling)

    def __call__(self, rows: Array, ids: Array, table: Array, padding_idx: int | None) -> Array:
        factor = self._factor(table)
        return (factor * (rows + self.plain.update(ids, padding_idx) * self.scaling)).astype(rows.dtype)

    def _factor(self, table: Float[Array, "vocab hidden"]) -> Float[Array, "hidden"]:
        """m / ‖V‖."""
        return self.magnitude / jax.lax.stop_gradient(jnp.linalg.norm(self.plain.merged(table), axis=0))

    def tied_logits(self, logits: Array, x: Array) -> Array:
        return self.plain.tied_logits(logits, x)

    def merged(self, weight: Float[Array, "vocab hidden"]) -> Float[Array, "vocab hidden"]:
        """m ⊙ V / ‖V‖."""
        return self._factor(weight) * self.plain.merged(weight)

    def unmerged(self, weight: Float[Array, "vocab hidden"]) -> Float[Array, "vocab hidden"]:
        """Raises `InputError`, as `DoraLinear.unmerged`."""
        raise InputError("a DoRA adapter cannot be taken out of a merged table, whose norm is lost; keep the base")

    def rescaled(self, scaling: float, rank: int) -> Self:
        plain = self.plain.rescaled(scaling, rank)
        return replace(self, lora_A=plain.lora_A, lora_B=plain.lora_B, scaling=scaling)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TokenRows:
    """Rows of the embedding that train in place of the table's own.

    **Fields**: `rows` `[tokens, hidden]`, `ids`, the tokens that they belong to.
    """

    rows: Float[Array, "tokens hidden"]
    ids: tuple[int, ...] = field(metadata={"static": True})

    def __call__(self, rows: Array, ids: Array, table: Array, padding_idx: int | None) -> Array:
        place = jnp.full(table.shape[0], -1).at[jnp.asarray(self.ids)].set(jnp.arange(len(self.ids)))
        own = look_up(self.rows, place[ids], None).astype(rows.dtype)
        if padding_idx is not None:
            own = jnp.where((ids == padding_idx)[..., None], jax.lax.stop_gradient(own), own)
        return jnp.where((place[ids] >= 0)[..., None], own, rows)

    def tied_logits(self, logits: Array, x: Array) -> Array:
        """The logits of a head that shares the table, these rows included, as in PEFT."""
        return HeadRows(self.rows, self.ids)(logits, x)

    def merged(self, weight: Float[Array, "vocab hidden"]) -> Float[Array, "vocab hidden"]:
        """The table with these rows."""
        return weight.astype(jnp.float32).at[jnp.asarray(self.ids)].set(self.rows.astype(jnp.float32))

    def unmerged(self, weight: Float[Array, "vocab hidden"]) -> Float[Array, "vocab hidden"]:
        """Raises `InputError`: the rows that were replaced are lost."""
        raise InputError("trained token rows cannot be taken out of a merged table; keep the base")


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class HeadRows(TokenRows):
    """The same for a linear output head."""

    def __call__(self, y: Array, x: Array, weight: Any = None, key: Any = None) -> Array:
        del weight, key
        own = project(x, self.rows.astype(x.dtype), y.dtype)
        return y.at[..., jnp.asarray(self.ids)].set(own)


def _rows_at_work(b: Array, rows: slice) -> Array:
    """Some rows of B, on a mesh those that each device has of them. Before and after B is cut every device is
    to have all of it, else the compiler cuts it evenly first and sends the pieces around."""
    whole = [None] * b.ndim
    part = constrain(constrain(b, *whole)[..., rows, :], *whole)
    return constrain(part, *whole[2:], "heads", None)


def _ratio(scaling: float, other: float) -> float:
    """scaling / other; 1 where they are the same, zero included."""
    return 1.0 if scaling == other else scaling / other


def _padded(a: Array, b: Array, rank: int) -> tuple[Array, Array]:
    """A and B with zeros up to another rank."""
    more = rank - a.shape[-2]
    if not more:
        return a, b
    lead = [(0, 0)] * (a.ndim - 2)
    return jnp.pad(a, [*lead, (0, more), (0, 0)]), jnp.pad(b, [*lead, (0, 0), (0, more)])
