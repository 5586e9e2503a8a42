"""The kinds of adapter: what each adds to a layer of the frozen base.

The idea of LoRA: a layer's weight W stays as it is, and beside it train two thin matrices, A and B, whose
product is a change of W of a low rank r. Their update of the output is scaled by s = alpha / r. B starts at
zero, so that before training nothing has changed; and afterwards the change can be added to W for good.

        the base                   with an adapter                       merged

          x [in]                       x [in]                             x [in]
            |                    .-------'-------.                          |
            |                    |               |  A [r, in]               |
       W [out, in]          W (frozen)           v                    W + s * B A
            |                    |             [r]  * s                     |
            |                    |               |                          |
            |                    v               v  B [out, r]              v
          y [out]           y [out] <---(+)------'                       y [out]

An adapter is a small pytree: its arrays are leaves, its scale and dropout static. The adapter of a stacked
layer holds stacked arrays, `[L, r, in]`; the model slices it as it slices the weights. Each kind says what it
makes of a layer's output (the call), and what the layer's weight becomes when base and adapter are merged
(`merged`, in float32) and separated again (`unmerged`).

A new kind is one more dataclass here, with these three methods and fields that declare themselves as below.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Self, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from phi3_jax.lora.low_rank import add_low_rank, add_low_rank_to_parts
from phi3_jax.model.dropout import DropKey, dropout, dropped
from phi3_jax.model.layers import look_up
from phi3_jax.model.products import precise_matmul, project
from phi3_jax.parallel.sharding import constrain
from phi3_jax.system.errors import InputError

# What a field declares: that it is static (no array), which axis of it counts the rank, and that the adapter's
# scale multiplies it, so that `stack.rescaled` can change rank and scale of any kind.
STATIC: Mapping[str, object] = {"static": True}
A: Mapping[str, object] = {"rank_axis": -2}
B: Mapping[str, object] = {"rank_axis": -1, "is_scaled": True}
BIAS: Mapping[str, object] = {"is_scaled": True}


class Additive:
    """An adapter that merging adds to a weight, and that can be taken out again by subtracting it."""

    def delta(self) -> Float[Array, "*weight"]:
        """What it adds to the weight, in float32."""
        raise NotImplementedError

    def merged(self, weight: Float[Array, "*weight"]) -> Float[Array, "*weight"]:
        """The weight with the adapter in it, in float32."""
        return weight.astype(jnp.float32) + self.delta()

    def unmerged(self, weight: Float[Array, "*weight"]) -> Float[Array, "*weight"]:
        """A merged weight without the adapter, in float32."""
        return weight.astype(jnp.float32) - self.delta()


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LoraLinear(Additive):
    """y + s · (dropout(x) Aᵀ Bᵀ + bias), in the type of x, summed in float32; see `add_low_rank`.

    Attributes:
        lora_A: A, `[*stack, r, in]`.
        lora_B: B, `[*stack, out, r]`.
        scaling: s.
        dropout: Probability of dropping an entry of x, where the call has a key.
        lora_bias: `[*stack, out]` or None.

    Example:
        >>> adapter = LoraLinear(jnp.ones((1, 3)), jnp.ones((2, 1)), scaling=0.5)
        >>> x, weight = jnp.ones(3), jnp.zeros((2, 3))
        >>> adapter(jnp.zeros(2), x, weight).tolist()
        [1.5, 1.5]
        >>> (adapter.merged(weight) @ x).tolist()
        [1.5, 1.5]
    """

    lora_A: Float[Array, "*stack r in"] = field(metadata=A)
    lora_B: Float[Array, "*stack out r"] = field(metadata=B)
    scaling: float = field(metadata=STATIC)
    dropout: float = field(default=0.0, metadata=STATIC)
    lora_bias: Float[Array, "*stack out"] | None = field(default=None, metadata=BIAS)

    @jax.named_scope("lora")
    def __call__(
        self,
        y: Float[Array, "*batch out"],
        x: Float[Array, "*batch in"],
        weight: Float[Array, "out in"] | None,
        key: DropKey | None = None,
    ) -> Float[Array, "*batch out"]:
        del weight  # a plain update does not look at the base
        kept, keep_scale = dropped(x, self.dropout, key)
        y = add_low_rank(y, kept, self.lora_A, self.lora_B, self.scaling * keep_scale)
        return y if self.lora_bias is None else (y + self.lora_bias * self.scaling).astype(y.dtype)

    @jax.named_scope("lora")
    def on_parts(
        self, parts: list[Array], x: Float[Array, "*batch in"], rows: list[slice], key: DropKey | None
    ) -> list[Array]:
        """The call for an output in parts, each of these rows: dropout and x Aᵀ once for all."""
        kept, keep_scale = dropped(x, self.dropout, key)
        bs = tuple(_used_rows(self.lora_B, part) for part in rows)
        out = add_low_rank_to_parts(tuple(parts), kept, self.lora_A, bs, self.scaling * keep_scale)
        if (bias := self.lora_bias) is None:
            return list(out)
        return [(y + bias[part] * self.scaling).astype(y.dtype) for y, part in zip(out, rows, strict=True)]

    def part(self, rows: slice) -> Self:
        """What it adds to these rows of the output."""
        bias = None if self.lora_bias is None else self.lora_bias[..., rows]
        return replace(self, lora_B=_used_rows(self.lora_B, rows), lora_bias=bias)

    def update(self, x: Float[Array, "*batch in"]) -> Float[Array, "*batch out"]:
        """x Aᵀ Bᵀ + bias, not yet scaled."""
        update = (x @ self.lora_A.T) @ self.lora_B.T
        return update if self.lora_bias is None else update + self.lora_bias

    def delta(self) -> Float[Array, "out in"]:
        """s · B A, in float32.

        Raises:
            InputError: Where B has a bias, for which Phi-3's layers have no place.
        """
        if self.lora_bias is not None:
            raise InputError("an adapter with lora_bias cannot be merged: Phi-3's layers have no bias; keep it beside")
        return self.scaling * precise_matmul(self.lora_B, self.lora_A)

    @property
    def rank(self) -> int:
        return self.lora_A.shape[-2]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ResidualLora(Additive):
    """LoRA whose initial A0 and B0 were taken out of the base: y + s · (x Aᵀ Bᵀ - x A0ᵀ B0ᵀ).

    PiSSA and OLoRA subtract s · B0 A0 from the base's weight. Here the base stays what it is and A0 and B0
    ride along, so that nothing is rounded, and the update of the untouched base is always at hand. LoftQ
    quantises W - s · B0 A0, so there they are out of the base already (`in_base`).

    Attributes:
        lora: What trains.
        start_A: A0, `[*stack, r, in]`, a constant.
        start_B: B0, `[*stack, out, r]`, a constant.
        in_base: Whether the base is without s · B0 A0 already.
    """

    lora: LoraLinear
    start_A: Float[Array, "*stack r in"] = field(metadata=A)
    start_B: Float[Array, "*stack out r"] = field(metadata=B)
    in_base: bool = field(default=False, metadata=STATIC)

    @property
    def scaling(self) -> float:
        return self.lora.scaling

    @property
    def rank(self) -> int:
        return self.lora.rank

    @jax.named_scope("lora")
    def __call__(
        self,
        y: Float[Array, "*batch out"],
        x: Float[Array, "*batch in"],
        weight: Float[Array, "out in"] | None,
        key: DropKey | None = None,
    ) -> Float[Array, "*batch out"]:
        if self.in_base:
            return self.lora(y, x, weight, key)
        # Not rounded to the output's type in between: what is added and subtracted is large and nearly equal.
        initial = LoraLinear(*jax.lax.stop_gradient((self.start_A, self.start_B)), self.scaling)
        without = y - initial.update(x.astype(self.start_A.dtype)) * self.scaling
        return self.lora(without, x, weight, key).astype(y.dtype)

    def part(self, rows: slice) -> Self:
        """What it adds to these rows of the output."""
        return replace(self, lora=self.lora.part(rows), start_B=_used_rows(self.start_B, rows))

    def as_plain(self) -> LoraLinear:
        """One plain adapter of twice the rank for the untouched base: A' = [A; A0], B' = [B, -B0]."""
        a = jnp.concatenate([self.lora.lora_A, self.start_A], axis=-2)
        b = jnp.concatenate([self.lora.lora_B, -self.start_B], axis=-1)
        return replace(self.lora, lora_A=a, lora_B=b)

    def delta(self) -> Float[Array, "out in"]:
        """s · (B A - B0 A0), which before training is zero to the last bit."""
        # The scale comes last: each product scaled in the same instruction as subtracted, they would not cancel.
        lora = self.lora
        return self.scaling * (precise_matmul(lora.lora_B, lora.lora_A) - precise_matmul(self.start_B, self.start_A))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DoraLinear:
    """DoRA: x W'ᵀ with W' = m ⊙ V / ‖V‖, V = W + s · B A, norms of rows.

    As the paper's section 4.3 has it (https://arxiv.org/abs/2402.09353), no gradient goes through the norm.
    With dropout the adapted part sees the dropped input, the base the whole one, as in PEFT.

    Attributes:
        lora_A: A, `[*stack, r, in]`.
        lora_B: B, `[*stack, out, r]`.
        magnitude: m, `[*stack, out]`.
        scaling: s.
        dropout: As in `LoraLinear`.
        active: Where some layers of a stack have no adapter, which have one, `[*stack]`; their A and B are
            zero, and their m / ‖V‖ is taken for 1.
    """

    lora_A: Float[Array, "*stack r in"] = field(metadata=A)
    lora_B: Float[Array, "*stack out r"] = field(metadata=B)
    magnitude: Float[Array, "*stack out"]
    scaling: float = field(metadata=STATIC)
    dropout: float = field(default=0.0, metadata=STATIC)
    active: Bool[Array, "*stack"] | None = None

    @jax.named_scope("lora")
    def __call__(
        self,
        y: Float[Array, "*batch out"],
        x: Float[Array, "*batch in"],
        weight: Float[Array, "out in"],
        key: DropKey | None = None,
    ) -> Float[Array, "*batch out"]:
        wide = x.astype(self.lora_A.dtype)
        factor = self._factor(weight.astype(wide.dtype))
        base = y
        if key is not None and self.dropout:
            wide = dropout(wide, self.dropout, key)
            base = project(wide, weight.astype(wide.dtype))
        update = (wide @ self.lora_A.T) @ self.lora_B.T * self.scaling
        return (y + (factor - 1) * base + factor * update).astype(y.dtype)

    def part(self, rows: slice) -> Self:
        """What it adds to these rows of the output."""
        return replace(self, lora_B=_used_rows(self.lora_B, rows), magnitude=self.magnitude[..., rows])

    def _factor(self, weight: Float[Array, "out in"]) -> Float[Array, "out"]:
        """m / ‖V‖."""
        norm = jnp.linalg.norm(weight + self._delta().astype(weight.dtype), axis=1)
        factor = self.magnitude / jax.lax.stop_gradient(norm)
        return factor if self.active is None else jnp.where(self.active, factor, 1)

    def _delta(self) -> Float[Array, "out in"]:
        return self.scaling * precise_matmul(self.lora_B, self.lora_A)

    def merged(self, weight: Float[Array, "out in"]) -> Float[Array, "out in"]:
        """m ⊙ V / ‖V‖, in float32."""
        wide = weight.astype(jnp.float32)
        return self._factor(wide)[:, None] * (wide + self._delta())

    def unmerged(self, weight: Float[Array, "out in"]) -> Float[Array, "out in"]:
        """Cannot be.

        Raises:
            InputError: Always: the norm that was divided by cannot be told from the merged weight.
        """
        raise InputError("a DoRA adapter cannot be taken out of a merged weight, whose norm is lost; keep the base")

    @property
    def rank(self) -> int:
        return self.lora_A.shape[-2]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LoraEmbedding(Additive):
    """E[ids] + s · A[:, ids]ᵀ Bᵀ; no dropout, as in PEFT and loralib.

    As in PEFT, A's column of the padding token gets no gradient.

    Attributes:
        lora_A: A, `[r, vocab]`.
        lora_B: B, `[hidden, r]`.
        scaling: s.
    """

    lora_A: Float[Array, "r vocab"] = field(metadata=A)
    lora_B: Float[Array, "hidden r"] = field(metadata=B)
    scaling: float = field(metadata=STATIC)

    @jax.named_scope("lora")
    def __call__(
        self,
        rows: Float[Array, "*batch hidden"],
        ids: Int[Array, "*batch"],
        table: Float[Array, "vocab hidden"],
        padding_idx: int | None,
    ) -> Float[Array, "*batch hidden"]:
        del table
        return (rows + self.update(ids, padding_idx) * self.scaling).astype(rows.dtype)

    def update(self, ids: Int[Array, "*batch"], padding_idx: int | None) -> Float[Array, "*batch hidden"]:
        """A[:, ids]ᵀ Bᵀ, not yet scaled."""
        return look_up(self.lora_A.T, ids, padding_idx) @ self.lora_B.T

    def tied_logits(
        self, logits: Float[Array, "*batch vocab"], x: Float[Array, "*batch hidden"]
    ) -> Float[Array, "*batch vocab"]:
        """The logits of a head that shares the table: as they are, since PEFT adapts the look-up alone."""
        del x
        return logits

    def delta(self) -> Float[Array, "vocab hidden"]:
        """s · (B A)ᵀ, in float32."""
        return self.scaling * precise_matmul(self.lora_A.T, self.lora_B.T)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DoraEmbedding:
    """DoRA on a table: m ⊙ V[ids] / ‖V‖, V = E + s · (B A)ᵀ, norms of columns, no gradient through them.

    Attributes:
        lora_A: A, `[r, vocab]`.
        lora_B: B, `[hidden, r]`.
        magnitude: m, `[hidden]`.
        scaling: s.
    """

    lora_A: Float[Array, "r vocab"] = field(metadata=A)
    lora_B: Float[Array, "hidden r"] = field(metadata=B)
    magnitude: Float[Array, "hidden"]
    scaling: float = field(metadata=STATIC)

    @property
    def plain(self) -> LoraEmbedding:
        """The same without a magnitude."""
        return LoraEmbedding(self.lora_A, self.lora_B, self.scaling)

    @jax.named_scope("lora")
    def __call__(
        self,
        rows: Float[Array, "*batch hidden"],
        ids: Int[Array, "*batch"],
        table: Float[Array, "vocab hidden"],
        padding_idx: int | None,
    ) -> Float[Array, "*batch hidden"]:
        factor = self._factor(table)
        adapted = rows + self.plain.update(ids, padding_idx) * self.scaling
        return jnp.asarray(factor * adapted, rows.dtype)

    def _factor(self, table: Float[Array, "vocab hidden"]) -> Float[Array, "hidden"]:
        """m / ‖V‖."""
        norm: Array = jax.lax.stop_gradient(jnp.linalg.norm(self.plain.merged(table), axis=0))
        return self.magnitude / norm

    def tied_logits(
        self, logits: Float[Array, "*batch vocab"], x: Float[Array, "*batch hidden"]
    ) -> Float[Array, "*batch vocab"]:
        """As those of `LoraEmbedding`."""
        return self.plain.tied_logits(logits, x)

    def merged(self, weight: Float[Array, "vocab hidden"]) -> Float[Array, "vocab hidden"]:
        """m ⊙ V / ‖V‖, in float32."""
        return self._factor(weight) * self.plain.merged(weight)

    def unmerged(self, weight: Float[Array, "vocab hidden"]) -> Float[Array, "vocab hidden"]:
        """Cannot be.

        Raises:
            InputError: Always, as `DoraLinear.unmerged`.
        """
        raise InputError("a DoRA adapter cannot be taken out of a merged table, whose norm is lost; keep the base")


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TokenRows:
    """Rows of the embedding that train in place of the table's own.

    Attributes:
        rows: `[tokens, hidden]`.
        ids: The tokens that they belong to.
    """

    rows: Float[Array, "tokens hidden"]
    ids: tuple[int, ...] = field(metadata=STATIC)

    @jax.named_scope("lora")
    def __call__(
        self,
        rows: Float[Array, "*batch hidden"],
        ids: Int[Array, "*batch"],
        table: Float[Array, "vocab hidden"],
        padding_idx: int | None,
    ) -> Float[Array, "*batch hidden"]:
        place = jnp.full(table.shape[0], -1).at[jnp.asarray(self.ids)].set(jnp.arange(len(self.ids)))
        own = look_up(self.rows, place[ids], None).astype(rows.dtype)
        if padding_idx is not None:
            own = jnp.where((ids == padding_idx)[..., None], jax.lax.stop_gradient(own), own)
        return jnp.where((place[ids] >= 0)[..., None], own, rows)

    def tied_logits(
        self, logits: Float[Array, "*batch vocab"], x: Float[Array, "*batch hidden"]
    ) -> Float[Array, "*batch vocab"]:
        """The logits of a head that shares the table, these rows included, as in PEFT."""
        return HeadRows(self.rows, self.ids)(logits, x)

    def merged(self, weight: Float[Array, "vocab hidden"]) -> Float[Array, "vocab hidden"]:
        """The table with these rows, in float32."""
        return weight.astype(jnp.float32).at[jnp.asarray(self.ids)].set(self.rows.astype(jnp.float32))

    def unmerged(self, weight: Float[Array, "vocab hidden"]) -> Float[Array, "vocab hidden"]:
        """Cannot be.

        Raises:
            InputError: Always: the rows that were replaced are lost.
        """
        raise InputError("trained token rows cannot be taken out of a merged table; keep the base")


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class HeadRows(TokenRows):
    """The same for a linear output head."""

    @jax.named_scope("lora")
    def __call__(self, y: Array, x: Array, weight: Array | None = None, key: object = None) -> Array:
        del weight, key
        own = project(x, self.rows.astype(x.dtype), y.dtype)
        return y.at[..., jnp.asarray(self.ids)].set(own)


def _used_rows(b: Float[Array, "*stack out r"], rows: slice) -> Float[Array, "*stack part r"]:
    """Some rows of B, on a mesh those that each device has of them. Before and after B is cut every device is
    to have all of it, else the compiler cuts it evenly first and sends the pieces around."""
    whole = [None] * b.ndim
    part = constrain(constrain(b, *whole)[..., rows, :], *whole)
    return constrain(part, *whole[2:], "heads", None)


StackableAdapter: TypeAlias = LoraLinear | ResidualLora | DoraLinear  # those of linear layers, as in the stack
RankedAdapter: TypeAlias = StackableAdapter | LoraEmbedding | DoraEmbedding
AnyAdapter: TypeAlias = RankedAdapter | TokenRows
