"""The ids that a model is asked to read, looked at where their values are known.

A compiled program cannot raise: of an id that the embedding has no row for it reads another row. So those who call
the model, or the loss, without `jax.jit` are told, and so are they whose ids are no argument of what is compiled.
"""

import jax
import numpy as np
from jaxtyping import ArrayLike, Int, Shaped
from numpy import ndarray

from phi3_jax.data.vocabulary import check_ids


def at_hand(array: Shaped[ArrayLike, "..."]) -> Shaped[ndarray, "..."] | None:
    """The values; None while a program is compiled, and where some of them are other hosts'.

    Example:
        >>> import jax.numpy as jnp
        >>> at_hand(jnp.arange(3))
        array([0, 1, 2], dtype=int32)
        >>> _ = jax.jit(lambda array: print(at_hand(array)))(jnp.arange(3))
        None
    """
    if isinstance(array, jax.core.Tracer) or (isinstance(array, jax.Array) and not array.is_fully_addressable):
        return None
    return np.asarray(array)


def check_input_ids(
    table_rows: int,
    input_ids: Int[ArrayLike, "batch seq"],
    attention_mask: Int[ArrayLike, "batch seq"] | None = None,
    segment_ids: Int[ArrayLike, "batch seq"] | None = None,
) -> None:
    """Looks whether the embedding has a row for every id that is not padding, where values are at hand.

    Args:
        table_rows: How many the embedding has.
        input_ids: The ids.
        attention_mask: 0 at padding.
        segment_ids: The same; they count more.

    Raises:
        InputError: For an id without a row.
    """
    given = attention_mask if segment_ids is None else segment_ids
    ids, is_real = at_hand(input_ids), None if given is None else at_hand(given)
    if ids is None or (given is not None and is_real is None):
        return
    if is_real is None:
        check_ids(ids, table_rows, "input_ids")
    elif is_real.shape == ids.shape:  # the model says what is wrong with others
        check_ids(np.where(is_real != 0, ids, 0), table_rows, "input_ids")
