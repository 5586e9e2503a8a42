"""The layers that Phi-3 is built of. Weights keep the checkpoint's names and `[out, in]` layout.

A layer made with `stack=(L,)` holds L layers' weights in one array; the model slices them while it
scans, and what runs is always a single layer.
"""

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, PyTree

from phi3_jax.config.model import Phi3Config
from phi3_jax.model.dropout import DropKey, DropoutKey, dropout, places_of, split_key
from phi3_jax.model.products import project, project_parts
from phi3_jax.model.protocols import Adapter, Adapters, EmbeddingAdapter, PartsAdapter, QuantizedWeight, State
from phi3_jax.model.remat import PRODUCT, checkpoint_name
from phi3_jax.model.rope import CosSin, apply_rope
from phi3_jax.model.sequence import in_pieces
from phi3_jax.parallel.mesh import ambient_mesh, platform
from phi3_jax.parallel.sharding import constrain

Kept = TypeVar("Kept")
# (q, k, v) -> weighted v, see `attention.attend`, and what the layer hands on beside its output: a cache, or None
Attend = Callable[[Array, Array, Array], tuple[Array, Kept]]
Stack = tuple[int, ...]
Axes = tuple[str | None, str | None]  # how a weight's rows and columns are cut while it is in use

ROWS: Axes = ("heads", None)  # what makes heads, hidden units or logits
COLUMNS: Axes = (None, "heads")  # what takes them in
_FEW_ROWS = 4096  # to a device


ACTIVATIONS = {
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_new": jax.nn.gelu,
    "gelu_pytorch_tanh": jax.nn.gelu,
    "relu": jax.nn.relu,
}


def look_up(
    table: Float[Array, "vocab hidden"], ids: Int[Array, "batch seq"], padding_idx: int | None
) -> Float[Array, "batch seq hidden"]:
    """Rows of a table; the padding token's row gets no gradient, as in PyTorch."""
    rows = table[ids]
    if padding_idx is None:
        return rows
    return jnp.where((ids == padding_idx)[..., None], jax.lax.stop_gradient(rows), rows)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SplitWeight:
    """A fused layer's weight held in its parts, so that devices can share the rows of each evenly.

    Attributes:
        parts: `[*stack, part, in]` each.
    """

    parts: tuple[Array, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """That of the whole, `[*stack, out, in]`."""
        *stack, _, columns = self.parts[0].shape
        return (*stack, sum(part.shape[-2] for part in self.parts), columns)


def dense(weight: nnx.Param[jax.Array], dtype: DTypeLike, axes: Axes) -> Float[Array, "out in"]:
    """A layer's weight as an array, dequantised to `dtype` where it is quantised.

    On a mesh it is gathered here, but for the rows or columns that `axes` cuts; quantised weights as
    they are stored, which is less to send.
    """
    value: jax.Array | SplitWeight | QuantizedWeight = weight.get_value()
    if isinstance(value, SplitWeight):
        value = jnp.concatenate(value.parts, axis=-2)
    if isinstance(value, jax.Array):
        return constrain(value, *axes)
    gathered = jax.tree.map(lambda x: constrain(x, *[None] * x.ndim), value)
    return constrain(gathered.dequantize(dtype), *axes)


def ready(weight: nnx.Param[jax.Array], dtype: DTypeLike, name: str) -> jax.Array | SplitWeight:
    """The weight of a layer of that name as `dense` gives it, but one that is held in parts stays so."""
    value: jax.Array | SplitWeight | QuantizedWeight = weight.get_value()
    if isinstance(value, SplitWeight):
        return SplitWeight(tuple(constrain(part, *ROWS) for part in value.parts))
    if isinstance(value, jax.Array) and value.ndim == 1:
        return value
    return dense(weight, dtype, ROWS if name in ("qkv_proj", "gate_up_proj") else COLUMNS)


def _normal(rngs: nnx.Rngs, shape: tuple[int, ...], std: float, dtype: DTypeLike) -> nnx.Param[jax.Array]:
    return nnx.Param((std * jax.random.normal(rngs.params(), shape, jnp.float32)).astype(dtype))


class Linear(nnx.Module):
    """x Wᵀ without a bias, and an optional adapter's update."""

    axes = COLUMNS

    def __init__(
        self, in_features: int, out_features: int, std: float, dtype: DTypeLike, rngs: nnx.Rngs, stack: Stack = ()
    ):
        self.weight = _normal(rngs, (*stack, out_features, in_features), std, dtype)

    def __call__(
        self, x: Float[Array, "*batch in"], adapter: Adapter | None = None, key: DropKey | None = None
    ) -> Float[Array, "*batch out"]:
        weight = dense(self.weight, x.dtype, self.axes)
        y = project(x, weight)
        y = y if adapter is None else adapter(y, x, weight, key)
        return checkpoint_name(constrain(y, "batch", "seq", None), PRODUCT)


class FusedLinear(Linear):
    """A linear layer whose output is cut into named parts, each of which may have an adapter of its own."""

    def __init__(
        self, in_features: int, parts: Mapping[str, int], std: float, dtype: DTypeLike, rngs: nnx.Rngs, stack: Stack
    ):
        super().__init__(in_features, sum(parts.values()), std, dtype, rngs, stack)
        self.names = tuple(parts)
        self.ends = tuple(itertools.accumulate(parts.values()))

    @property
    def rows(self) -> dict[str, slice]:
        """Where in the weight's rows each part is."""
        starts = (0, *self.ends[:-1])
        return {name: slice(*ends) for name, *ends in zip(self.names, starts, self.ends, strict=True)}

    def split(
        self, x: Float[Array, "*batch in"], adapter: Adapter | None, part_adapters: Adapters, key: DropKey | None
    ) -> list[Float[Array, "*batch part"]]:
        """The parts of the output, given the adapter of the whole and, by name, those of parts."""
        whole_key, *keys = split_key(key, 1 + len(self.names))
        weights, parts = self._project(x, adapter, whole_key)
        for i, name in enumerate(self.names):
            if name in part_adapters:
                parts[i] = part_adapters[name](parts[i], x, weights[i], keys[i])
        return [checkpoint_name(constrain(part, "batch", "seq", "heads"), PRODUCT) for part in parts]

    def _project(self, x: Array, adapter: Adapter | None, key: DropKey | None) -> tuple[list[Array], list[Array]]:
        """The parts of the weight, and those of the output with the adapter of the whole."""
        value: jax.Array | SplitWeight | QuantizedWeight = self.weight.get_value()
        rows = list(self.rows.values())
        if isinstance(value, SplitWeight):
            weights = [constrain(part, *ROWS) for part in value.parts]
            return weights, _adapted([project(x, weight) for weight in weights], adapter, x, weights, rows, key)
        weight = dense(self.weight, x.dtype, ROWS)
        weights = [weight[part] for part in rows]
        if _in_parts(x):
            parts = list(project_parts(x, weight, tuple((part.start, part.stop) for part in rows)))
            return weights, _adapted(parts, adapter, x, weights, rows, key)
        y = project(x, weight)
        if adapter is not None:
            y = adapter(y, x, weight, key)
        return weights, jnp.split(y, self.ends[:-1], axis=-1)


def _in_parts(x: Float[Array, "*batch in"]) -> bool:
    """Whether a fused layer's parts are better off as products of their own: on TPUs, where to cut outputs and to
    join their gradients takes longer than more products do; not of so few rows that it is less than what one more
    copy of a layer's weight takes, which XLA makes for them out of the stack."""
    mesh = ambient_mesh()
    few = x.size < _FEW_ROWS * mesh.size * x.shape[-1]
    return platform() == "tpu" and x.dtype.itemsize == 2 and mesh.shape["tensor"] == 1 and not few


def _adapted(
    parts: list[Array],
    adapter: Adapter | None,
    x: Array,
    weights: list[Array],
    rows: list[slice],
    key: DropKey | None,
) -> list[Array]:
    """The parts of an output with what the adapter of the whole adds to each."""
    if adapter is None:
        return parts
    if isinstance(adapter, PartsAdapter):
        return adapter.on_parts(parts, x, rows, key)
    # The same key: the parts' input is one and the same.
    cut = zip(parts, weights, rows, strict=True)
    return [adapter.part(part)(y, x, weight, key) for y, weight, part in cut]


class Embedding(nnx.Module):
    """Rows of a table, and an optional adapter's update."""

    def __init__(self, vocab: int, hidden: int, padding_idx: int | None, std: float, dtype: DTypeLike, rngs: nnx.Rngs):
        self.weight = _normal(rngs, (vocab, hidden), std, dtype)
        self.padding_idx = padding_idx

    @jax.named_scope("embedding")
    def __call__(
        self, ids: Int[Array, "batch seq"], adapter: EmbeddingAdapter | None = None
    ) -> Float[Array, "batch seq hidden"]:
        table = constrain(self.weight[...], *ROWS)
        rows = look_up(table, ids, self.padding_idx)
        rows = rows if adapter is None else adapter(rows, ids, table, self.padding_idx)
        return constrain(rows, "batch", "seq", None)


class RMSNorm(nnx.Module):
    """x / rms(x) · weight: normalised in float32, cast back, then multiplied."""

    def __init__(self, size: int, eps: float, dtype: DTypeLike, stack: Stack = ()):
        self.weight = nnx.Param(jnp.ones((*stack, size), dtype))
        self.eps = eps

    @jax.named_scope("norm")
    def __call__(self, x: Float[Array, "*batch hidden"]) -> Float[Array, "*batch hidden"]:
        wide = x.astype(jnp.float32)
        normed = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.eps)
        return self.weight[...] * normed.astype(x.dtype)


class Phi3Attention(nnx.Module):
    """Self-attention with q, k and v fused in one projection, and grouped key-value heads."""

    def __init__(self, config: Phi3Config, dtype: DTypeLike, rngs: nnx.Rngs, stack: Stack):
        std, width = config.initializer_range, config.num_attention_heads * config.head_dim
        qkv = dict(zip(("q_proj", "k_proj", "v_proj"), config.qkv_sizes, strict=True))
        self.qkv_proj = FusedLinear(config.hidden_size, qkv, std, dtype, rngs, stack)
        self.o_proj = Linear(width, config.hidden_size, std, dtype, rngs, stack)
        self.head_dim = config.head_dim

    @jax.named_scope("attention")
    def heads(
        self, x: Float[Array, "batch seq hidden"], cos_sin: CosSin, adapters: Adapters, key: DropKey | None
    ) -> tuple[Array, Array, Array]:
        """q, k and v of every position, `[batch, seq, heads, head_dim]`, the first two rotated."""
        with jax.named_scope("qkv_proj"):
            q, k, v = (
                part.reshape(*x.shape[:2], -1, self.head_dim)
                for part in self.qkv_proj.split(x, adapters.get("qkv_proj"), adapters, key)
            )  # [B, T, N, H], [B, T, K, H] twice
        with jax.named_scope("rope"):
            return apply_rope(q, *cos_sin), apply_rope(k, *cos_sin), v

    @jax.named_scope("attention")
    @jax.named_scope("o_proj")
    def output(
        self, out: Float[Array, "batch seq heads head_dim"], adapters: Adapters, key: DropKey | None
    ) -> Float[Array, "batch seq hidden"]:
        """What the heads' results are made into."""
        return self.o_proj(out.reshape(*out.shape[:2], -1), adapters.get("o_proj"), key)


# Of what is in between nothing is kept for the backward pass, under any policy.
@partial(jax.checkpoint, prevent_cse=False, static_argnums=0)
@jax.named_scope("gated")
def _gated(activation: str, gate: Array, up: Array) -> Array:
    """up · act(gate), rounded once: CPUs take long over every step's rounding."""
    wide = up.astype(jnp.float32) * ACTIVATIONS[activation](gate.astype(jnp.float32))
    return wide.astype(up.dtype)


class Phi3MLP(nnx.Module):
    """down(up · act(gate)), gate and up fused in one projection."""

    def __init__(self, config: Phi3Config, dtype: DTypeLike, rngs: nnx.Rngs, stack: Stack):
        std, inner = config.initializer_range, config.intermediate_size
        self.gate_up_proj = FusedLinear(
            config.hidden_size, {"gate_proj": inner, "up_proj": inner}, std, dtype, rngs, stack
        )
        self.down_proj = Linear(inner, config.hidden_size, std, dtype, rngs, stack)
        self.hidden_act = config.hidden_act

    @jax.named_scope("mlp")
    def __call__(
        self, x: Float[Array, "batch seq hidden"], adapters: Adapters, key: DropKey | None
    ) -> Float[Array, "batch seq hidden"]:
        up_key, down_key = split_key(key, 2)
        with jax.named_scope("gate_up_proj"):
            gate, up = self.gate_up_proj.split(x, adapters.get("gate_up_proj"), adapters, up_key)
        inner = _gated(self.hidden_act, gate, up)
        with jax.named_scope("down_proj"):
            return self.down_proj(inner, adapters.get("down_proj"), down_key)


class Phi3DecoderLayer(nnx.Module):
    """Pre-norm attention and MLP, each with dropout (`resid_pdrop`) on its branch."""

    def __init__(self, config: Phi3Config, dtype: DTypeLike, rngs: nnx.Rngs, stack: Stack = ()):
        self.self_attn = Phi3Attention(config, dtype, rngs, stack)
        self.mlp = Phi3MLP(config, dtype, rngs, stack)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype, stack)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype, stack)
        self.resid_pdrop = config.resid_pdrop

    def __call__(
        self,
        x: Float[Array, "batch seq hidden"],
        cos_sin: CosSin,
        attend: Attend[Kept],
        adapters: Adapters,
        key: DropKey | None = None,
        pieces: int = 1,
    ) -> tuple[Float[Array, "batch seq hidden"], Kept]:
        """The layer's output, and what `attend` hands on; see `in_pieces` for what `pieces` means."""
        places = None
        if key is not None and pieces > 1:  # so that they can be cut
            key, places = (key.key, key.places) if isinstance(key, DropoutKey) else (key, places_of(x.shape[:2]))
        attn_key, *keys = split_key(key, 4)
        qkv_key, o_key = split_key(attn_key, 2)
        attn, mlp = adapters.get("self_attn", {}), adapters.get("mlp", {})
        before = {name: adapter for name, adapter in attn.items() if name != "o_proj"}
        after = {name: adapter for name, adapter in attn.items() if name == "o_proj"}, mlp
        q, k, v = self._in_pieces(Phi3DecoderLayer._before, pieces, (before, qkv_key), (x, cos_sin), places)
        with jax.named_scope("attention"), jax.named_scope("attend"):
            out, kept = attend(q, k, v)
        return self._in_pieces(Phi3DecoderLayer._after, pieces, (*after, o_key, *keys), (x, out), places), kept

    def _before(self, whole: tuple[Adapters, DropKey | None], cut: tuple[Array, CosSin]) -> tuple[Array, Array, Array]:
        """What attention takes."""
        (adapters, key), (x, cos_sin) = whole, cut
        return self.self_attn.heads(self.input_layernorm(x), cos_sin, adapters, key)

    def _after(self, whole: tuple[Adapters, Adapters, *tuple[DropKey | None, ...]], cut: tuple[Array, Array]) -> Array:
        """The layer's output of its input and what attention gives."""
        (attn_adapters, mlp_adapters, *keys), (x, out) = whole, cut
        o_key, attn_drop, mlp_key, mlp_drop = keys
        attn = self.self_attn.output(out, attn_adapters, o_key)
        x = x + dropout(attn, self.resid_pdrop, attn_drop)
        mlp = self.mlp(self.post_attention_layernorm(x), mlp_adapters, mlp_key)
        return x + dropout(mlp, self.resid_pdrop, mlp_drop)

    def _in_pieces(
        self, part: Callable[..., PyTree], pieces: int, whole: PyTree, cut: PyTree, places: Array | None
    ) -> PyTree:
        """A part of the layer in pieces; its weights are gathered and made dense once for all of them.

        Keys of dropout in `whole` get the places of each piece.
        """
        if pieces == 1:
            return part(self, whole, cut)
        graph, state = nnx.split(self)
        dtype = jax.tree.leaves(cut)[0].dtype
        used = _WEIGHTS[part.__name__]
        weights = {
            path: leaf.replace(ready(leaf, dtype, str(path[-2])) if path[:-1] in used else jnp.zeros(0))
            for path, leaf in nnx.to_flat_state(state)
        }

        def of_piece(given: tuple[State, PyTree], own: tuple[PyTree, Array]) -> PyTree:
            def placed(x: Array) -> Array | DropoutKey:
                return DropoutKey(x, own[1]) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x

            return part(nnx.merge(graph, given[0]), jax.tree.map(placed, given[1]), own[0])

        return in_pieces(of_piece, pieces, (nnx.from_flat_state(weights), whole), (cut, places))


# What each part of the layer takes.
_WEIGHTS = {
    "_before": {("input_layernorm",), ("self_attn", "qkv_proj")},
    "_after": {
        ("self_attn", "o_proj"),
        ("post_attention_layernorm",),
        ("mlp", "gate_up_proj"),
        ("mlp", "down_proj"),
    },
}
