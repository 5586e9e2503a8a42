"""The keys and values of what a model has read already, so that the next token costs one token's work.

Columns and slots: a batch is read in columns, one token of every row at a time, rows padded on the
left. Column c is kept in slot `c mod capacity`. With a sliding window the capacity is at most the
window, and a new column takes the place of the one that has just left it; otherwise all columns have
room and nothing is ever overwritten.
"""

import math
from dataclasses import dataclass, field, replace

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from phi3_jax.config.model import Phi3Config
from phi3_jax.parallel.mesh import platform
from phi3_jax.parallel.sharding import constrain

# Of a layer's keys or values, [batch, kv_heads, capacity, head_dim].
LAYER_AXES = ("batch", "heads", None, None)

Stacked = Float[Array, "layers batch kv_heads capacity head_dim"]
Unstacked = tuple[Float[Array, "batch kv_heads capacity head_dim"], ...]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Cache:
    """What `model(input_ids, cache=...)` takes and gives back.

    Attributes:
        k: rotated keys, `[layers, batch, kv_heads, capacity, head_dim]`, or a tuple of the layers' arrays.
        v: values, likewise.
        starts: the column of each row's first token; what is before it is padding.
        length: the number of columns read.
        empty: nothing was read yet.
    """

    k: Stacked | Unstacked
    v: Stacked | Unstacked
    starts: Int[Array, "batch"]
    length: Int[Array, ""]
    empty: bool = field(metadata={"static": True})

    @property
    def capacity(self) -> int:
        """The number of columns that have room."""
        first = self.k[0] if isinstance(self.k, tuple) else self.k
        return first.shape[-2]

    def rows(self, rows: Int[Array, "answers"]) -> "Cache":
        """The cache of a batch made of these rows, in this order; a row may be there more than once."""
        axis = 0 if isinstance(self.k, tuple) else 1
        k, v = jax.tree.map(lambda x: jnp.take(x, rows, axis=axis), (self.k, self.v))
        return replace(self, k=k, v=v, starts=self.starts[rows])

    def unstacked(self) -> "Cache":
        """With the layers' arrays in a tuple."""
        return self if isinstance(self.k, tuple) else replace(self, k=tuple(self.k), v=tuple(self.v))


def empty_cache(config: Phi3Config, batch: int, capacity: int, dtype: DTypeLike) -> Cache:
    """Room for `capacity` columns of `batch` rows; for no more than the sliding window, where there is one."""
    shape = _shape(config, batch, capacity)
    k, v = (constrain(jnp.zeros(shape, dtype), None, *LAYER_AXES) for _ in range(2))
    return Cache(k, v, jnp.zeros(batch, jnp.int32), jnp.zeros((), jnp.int32), True)


def cache_bytes(config: Phi3Config, batch: int, capacity: int, dtype: DTypeLike) -> int:
    """The size of such a cache."""
    itemsize: int = jnp.dtype(dtype).itemsize
    return 2 * math.prod(_shape(config, batch, capacity)) * itemsize


def _shape(config: Phi3Config, batch: int, capacity: int) -> tuple[int, ...]:
    columns = min(capacity, config.sliding_window or capacity)
    return config.num_hidden_layers, batch, config.num_key_value_heads, columns, config.head_dim


def slot_columns(length: Int[Array, ""], capacity: int) -> Int[Array, "capacity"]:
    """The column in each slot once `length` columns are read, the newest that belongs there; negative where none is."""
    last = length - 1
    return last - (last - jnp.arange(capacity)) % capacity


def store(
    stack: Float[Array, "layers batch kv_heads capacity head_dim"],
    layer: Int[Array, ""] | int,
    new: Float[Array, "batch seq kv_heads head_dim"],
    first: Int[Array, ""],
) -> Float[Array, "layers batch kv_heads capacity head_dim"]:
    """The stack, where `layer` also has the keys or values of the columns from `first` on (negative: padding)."""
    seq, capacity = new.shape[1], stack.shape[3]
    new = new.astype(stack.dtype).transpose(0, 2, 1, 3)  # [B, K, T, H]
    if seq == 1:  # a single place, which XLA writes without touching the others
        return jax.lax.dynamic_update_slice(stack, new[None], (layer, 0, 0, first % capacity, 0))
    place = slot_columns(first + seq, capacity) - first
    taken = jnp.take(new, jnp.clip(place, 0, seq - 1), axis=2)
    filled = jnp.where((place >= 0)[:, None], taken, stack[layer])
    updated: Array = jax.lax.dynamic_update_index_in_dim(stack, constrain(filled, *LAYER_AXES), layer, 0)
    return updated


def attend_cached(
    q: Float[Array, "batch seq heads head_dim"],
    k: Float[Array, "batch kv_heads keys head_dim"],
    v: Float[Array, "batch kv_heads keys head_dim"],
    seen: Bool[Array, "batch seq keys"],
) -> Float[Array, "batch seq heads head_dim"]:
    """softmax(q kᵀ / √head_dim) v over the keys that are seen; scores and softmax in float32."""
    batch, seq, heads, head_dim = q.shape
    dtype = q.dtype
    if platform() == "cpu":  # for a few queries and 16-bit numbers XLA has no products that are summed in float32 there
        q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
    grouped = q.reshape(batch, seq, k.shape[1], -1, head_dim)  # [B, T, K, G, H]
    scores = jnp.einsum("btkgh,bkch->bkgtc", grouped, k, preferred_element_type=jnp.float32)
    scores = jnp.where(seen[:, None, None], scores * head_dim**-0.5, -jnp.inf)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    out = jnp.einsum("bkgtc,bkch->btkgh", weights, v, preferred_element_type=jnp.float32)
    return out.reshape(batch, seq, heads, head_dim).astype(dtype)


def seen_keys(
    queries: Int[Array, "seq"],
    keys: Int[Array, "keys"],
    starts: Int[Array, "batch"],
    sliding_window: int | None,
) -> Bool[Array, "batch seq keys"]:
    """Which columns of keys the columns of queries see: not the future, not padding, within the window.

    A column of padding sees itself, so that no row of the softmax is empty.
    """
    distance = queries[:, None] - keys[None, :]
    near = (distance >= 0) & (keys >= 0)
    if sliding_window is not None:
        near &= distance < sliding_window
    return (near & (keys >= starts[:, None, None])) | (distance == 0)
