"""Dropout whose mask is a function of a key and of places in the global batch, whoever computes which part."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PRNGKeyArray, UInt32


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DropoutKey:
    """A key, and where in the global batch the positions at hand are: for a part of a batch.

    Attributes:
        key: for all of the batch.
        places: as many as positions at hand; see `places_of`.
    """

    key: PRNGKeyArray
    places: UInt32[Array, "*batch"]


# A plain key is for arrays of a whole batch.
DropKey = PRNGKeyArray | DropoutKey


def places_of(shape: Sequence[int]) -> UInt32[Array, "*batch"]:
    """The places of a whole batch's positions, `[rows, positions]` as a rule: counted row after row.

    Example:
        >>> places_of((2, 3)).tolist()
        [[0, 1, 2], [3, 4, 5]]
    """
    places = jnp.zeros(tuple(shape), jnp.uint32)
    for axis, size in enumerate(shape):
        places = places * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, tuple(shape), axis)
    return places


def split_key(key: DropKey | None, number: int) -> Sequence[DropKey | None]:
    """`number` keys, or as many None where there is no randomness.

    Example:
        >>> split_key(None, 2)
        [None, None]
    """
    if key is None:
        return [None] * number
    if isinstance(key, DropoutKey):
        return [replace(key, key=own) for own in jax.random.split(key.key, number)]
    return list(jax.random.split(key, number))


def dropout(x: Float[Array, "*shape"], rate: float, key: DropKey | None) -> Float[Array, "*shape"]:
    """Inverted dropout; the identity without a key.

    Example:
        >>> import jax
        >>> dropout(jnp.ones(8), 0.5, jax.random.key(0)).tolist()
        [0.0, 0.0, 2.0, 2.0, 2.0, 0.0, 2.0, 0.0]
    """
    kept, scale = dropped(x, rate, key)
    return kept if scale == 1 else kept * scale


@jax.named_scope("dropout")
def dropped(x: Float[Array, "*shape"], rate: float, key: DropKey | None) -> tuple[Float[Array, "*shape"], float]:
    """Zeros where dropout drops, and what to multiply the rest by.

    Example:
        >>> x = jnp.ones(4)
        >>> dropped(x, 0.1, None) == (x, 1.0)
        True
    """
    if key is None or rate == 0:
        return x, 1.0
    if not isinstance(key, DropoutKey):
        key = DropoutKey(key, places_of(x.shape[:-1]))
    return jnp.where(keeps(key, x.shape[-1], rate), x, 0), 1 / (1 - rate)


@partial(jax.jit, static_argnames=("columns", "rate"))
def keeps(key: DropoutKey, columns: int, rate: float) -> Bool[Array, "*batch columns"]:
    """Where dropout keeps a number: at each place and column by itself, at `rate` to 32 bits.

    Every place and every column has two words of the threefry cipher, and each decision is a keyed hash of the
    four. A word of the cipher for each decision would be twenty rounds each, ten times as long on CPUs.

    Example:
        >>> import jax
        >>> mask = keeps(DropoutKey(jax.random.key(0), places_of((64, 8))), 96, 0.25)
        >>> mask.shape, round(float(mask.mean()), 2)
        ((64, 8, 96), 0.75)
    """
    words = jax.random.bits(key.key, (2,), jnp.uint32)
    of_places = threefry(words, key.places[..., None], 0)
    of_columns = threefry(words, jnp.arange(columns, dtype=jnp.uint32), 1)
    first, second = (a ^ b for a, b in zip(of_places, of_columns, strict=True))
    # Multipliers and shifts are those of the hash "lowbias32", whose bits each depend on all bits.
    mixed = first * jnp.uint32(0x7FEB352D)
    mixed = ((mixed ^ (mixed >> 15)) + second) * jnp.uint32(0x846CA68B)
    kept: Array = mixed >= jnp.uint32(min(round(rate * 2**32), 2**32 - 1))
    return kept


def threefry(
    key: UInt32[Array, "2"], numbers: UInt32[Array, "*numbers"], kind: int
) -> tuple[UInt32[Array, "*numbers"], UInt32[Array, "*numbers"]]:
    """The cipher Threefry-2x32 of 20 rounds, of each number with `kind` (Salmon et al. 2011).

    In plain operations, since JAX's own loops over its rounds on CPUs and does not take arrays under `jax.vmap`.

    Example:
        >>> first, second = threefry(jnp.zeros(2, jnp.uint32), jnp.zeros(1, jnp.uint32), 0)
        >>> hex(first[0]), hex(second[0])
        ('0x6b200159', '0x99ba4efe')
    """
    keys = key[0], key[1], key[0] ^ key[1] ^ jnp.uint32(0x1BD11BDA)
    first, second = numbers + keys[0], keys[1] + jnp.uint32(kind)
    for group in range(5):
        for turn in ((13, 15, 26, 6), (17, 29, 16, 24))[group % 2]:
            first = first + second
            second = ((second << turn) | (second >> (32 - turn))) ^ first
        first = first + keys[(group + 1) % 3]
        second = second + keys[(group + 2) % 3] + jnp.uint32(group + 1)
    return first, second
