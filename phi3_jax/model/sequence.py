"""Long rows: what a layer does with each position by itself, done a piece of the sequence at a time.

Attention alone looks from one position at others. All else of a layer, its norms and products, can go piece by
piece, forwards and backwards, so that what is in between, the MLP's hidden units first of all, is never there for
a whole row. Of a piece nothing is kept for the backward pass but what it was given.
"""

import math
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from phi3_jax.model.products import precise
from phi3_jax.parallel.mesh import ambient_mesh
from phi3_jax.system.errors import InputError

AUTO, NONE = "auto", "none"
# `auto` leaves rows whole up to here, of which a device's part counts; longer ones it cuts into pieces as long
# as allowed here. Compiled for a v6e, shorter pieces save little more, and longer rows than this gain.
WHOLE_LENGTH = 16384
PIECE_LENGTH = 8192
_LEAST_PIECE = 1024

Function = Callable[..., PyTree]


def piece_count(wanted: int | str, length: int) -> int:
    """How many pieces a row is cut into.

    Args:
        wanted: that many; `none`, one; or `auto`, as long rows need. Of rows that so many do not divide, as those of
            a shorter program are, as many as divide both.
        length: of a device's part of the row.

    Raises:
        InputError: for another word, or no number above 0.

    Example:
        >>> piece_count("auto", 4096), piece_count("auto", 131072), piece_count("none", 131072)
        (1, 16, 1)
        >>> piece_count(12, 4096)
        4
    """
    if wanted == NONE:
        return 1
    if wanted == AUTO:
        return 1 if length <= WHOLE_LENGTH else _even_pieces(length)
    if isinstance(wanted, str) or wanted < 1:
        raise InputError(f"chunk_mlp is {wanted!r}, expected auto, none or a number of pieces from 1 on")
    return math.gcd(wanted, length)


def _even_pieces(length: int) -> int:
    """The fewest pieces that are short enough; 1 where only too short ones divide the length."""
    fewest, most = math.ceil(length / PIECE_LENGTH), length // _LEAST_PIECE
    return next((number for number in range(fewest, most + 1) if length % number == 0), 1)


def in_pieces(function: Function, pieces: int, whole: PyTree, cut: PyTree, axes: PyTree = 1) -> PyTree:
    """`function(whole, cut)`, given of `cut` a piece of the sequence at a time.

    Gradients of `whole` are summed over the pieces in float32. On a mesh whose `context` shares a row, each piece
    has a part of every device's positions.

    Args:
        function: of each position by itself. Differentiated, it is called again for each piece.
        pieces: how many; a divisor of the length that a device has.
        whole: arrays that every piece is given.
        cut: arrays `[batch, seq, ...]`.
        axes: where in the results the sequence is: a tree like theirs, or one number for all.

    Example:
        >>> import jax.numpy as jnp
        >>> x = jnp.arange(8.0).reshape(1, 8, 1)
        >>> in_pieces(lambda w, x: x @ w, 4, jnp.full((1, 1), 2.0), x)[0, :, 0].tolist()
        [0.0, 2.0, 4.0, 6.0, 8.0, 10.0, 12.0, 14.0]
    """
    if pieces == 1:
        return function(whole, cut)
    return _mapped(function, pieces, axes if isinstance(axes, int) else tuple(axes), whole, cut)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _mapped(function: Function, pieces: int, axes: PyTree, whole: PyTree, cut: PyTree) -> PyTree:
    results = jax.lax.map(partial(function, whole), jax.tree.map(partial(_cut, pieces), cut))
    return jax.tree.map(partial(_join, pieces), results, _like(results, axes))


def _forward(function: Function, pieces: int, axes: PyTree, whole: PyTree, cut: PyTree) -> tuple[PyTree, PyTree]:
    given = whole, cut
    values = jax.custom_derivatives.custom_vjp_primal_tree_values(given)
    trains = jax.tree.map(lambda primal: primal.perturbed, given)
    # JAX takes it that a function keeps trees of one form, whatever it is differentiated by: an empty array is
    # where there is nothing.
    trained = jax.tree.map(lambda value, trains: value if trains else jnp.zeros(0), values, trains)
    frozen = jax.tree.map(lambda value, trains: jnp.zeros(0) if trains else value, values, trains)
    return _mapped(function, pieces, axes, *values), (trained, frozen)


def _backward(function: Function, pieces: int, axes: PyTree, kept: PyTree, cotangents: PyTree) -> PyTree:
    (whole, cut), (frozen_whole, frozen_cut) = kept
    cotangents = jax.tree.map(lambda g: jnp.zeros(g.shape, g.dtype) if _is_zero(g) else g, cotangents, is_leaf=_is_zero)
    slopes = jax.tree.map(partial(_cut, pieces), cotangents, _like(cotangents, axes))

    def step(sums: PyTree, piece: tuple[PyTree, PyTree, PyTree]) -> tuple[PyTree, PyTree]:
        own, frozen_own, slope = piece

        def of_trained(whole: PyTree, own: PyTree) -> PyTree:
            return function(_either(whole, frozen_whole), _either(own, frozen_own))

        dtypes = [x.dtype for x in jax.tree.leaves(slope)]
        with precise(dtypes[0]):  # said here, since differentiation calls this from elsewhere
            more, d_own = jax.vjp(of_trained, whole, own)[1](slope)
        return jax.tree.map(lambda a, b: a + b.astype(a.dtype), sums, more), d_own

    start = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.promote_types(x.dtype, jnp.float32)), whole)
    pieces_of = jax.tree.map(lambda x: _cut(pieces, x) if x.size else jnp.zeros((pieces, 0)), (cut, frozen_cut))
    sums, d_cut = jax.lax.scan(step, start, (*pieces_of, slopes))
    d_whole = jax.tree.map(lambda d, x: d.astype(x.dtype) if x.size else None, sums, whole)
    return d_whole, jax.tree.map(lambda d, x: _join(pieces, d, 1) if x.size else None, d_cut, cut)


_mapped.defvjp(_forward, _backward, symbolic_zeros=True)


def _is_zero(x: object) -> bool:
    return isinstance(x, jax.custom_derivatives.SymbolicZero)


def _either(trained: PyTree, frozen: PyTree) -> PyTree:
    return jax.tree.map(lambda a, b: a if a.size else b, trained, frozen)


def _like(tree: PyTree, axes: PyTree) -> PyTree:
    return jax.tree.map(lambda _: axes, tree) if isinstance(axes, int) else axes


def shards(length: int) -> int:
    """How many devices share a row of such a length."""
    context: int = ambient_mesh().shape["context"]
    return context if length % context == 0 else 1


def _cut(pieces: int, x: Float[Array, "*shape"], axis: int = 1) -> Float[Array, "pieces *piece"]:
    """Every device's positions in pieces, the number of the piece first."""
    before, length, after = x.shape[:axis], x.shape[axis], x.shape[axis + 1 :]
    devices = shards(length)
    parts = jnp.moveaxis(x.reshape(*before, devices, pieces, -1, *after), axis + 1, 0)
    return parts.reshape(pieces, *before, length // pieces, *after)


def _join(pieces: int, x: Float[Array, "pieces *piece"], axis: int) -> Float[Array, "*shape"]:
    """The inverse of `_cut`."""
    before, length, after = x.shape[1 : axis + 1], x.shape[axis + 1], x.shape[axis + 2 :]
    devices = shards(length)
    parts = jnp.moveaxis(x.reshape(pieces, *before, devices, -1, *after), 0, axis + 1)
    return parts.reshape(*before, pieces * length, *after)
