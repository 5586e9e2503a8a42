"""Token ids against the rows of the model's embedding.

A tokenizer can have tokens that the table has no row for: some were added, or it is another model's. XLA says
nothing of an id that is out of range: it reads some other row, or fills in NaN.
"""

from collections.abc import Sequence
from itertools import groupby

import numpy as np
from jaxtyping import ArrayLike, Int
from numpy import ndarray

from phi3_jax.data.rows import TokenizedRows
from phi3_jax.data.tokenizer import Tokenizer
from phi3_jax.system.errors import InputError
from phi3_jax.system.text import counted, shown

_SHOWN = 3  # tokens, and runs of ids, that a message lists


def check_ids(
    ids: Int[ArrayLike, "..."] | Sequence[int], table_rows: int, where: str, tokenizer: Tokenizer | None = None
) -> None:
    """Looks whether the model's embedding has a row for every token.

    Args:
        ids: Whole numbers of any type and shape, on this host.
        table_rows: How many rows the embedding has.
        where: What messages call the ids, such as "chats.jsonl, row 3".
        tokenizer: Tells the token's name, and which rows have no token yet.

    Raises:
        InputError: For the first id that is negative or has no row, and for numbers that are not whole.

    Example:
        >>> check_ids([1, 5, 9], 10, "chats.jsonl, row 3")
        >>> check_ids([1, 5, 10], 10, "chats.jsonl, row 3")
        Traceback (most recent call last):
            ...
        phi3_jax.system.errors.InputError: chats.jsonl, row 3: token id 10 has no row in the model's embedding, which \
has 10 (ids 0 to 9); take the ids of the checkpoint's own tokenizer
    """
    array = np.asarray(ids)
    if not array.size:
        return
    if array.dtype.kind not in "iu":
        raise InputError(f"{where}: token ids are of type {array.dtype}, expected whole numbers below {table_rows:,}")
    if array.min() >= 0 and array.max() < table_rows:
        return
    place = _first_outside(array, table_rows)
    if array.ndim > 1:
        where += str([int(index) for index in np.unravel_index(place, array.shape)])
    raise InputError(f"{where}: {_refusal(int(array.flat[place]), table_rows, tokenizer)}")


def check_vocabulary(sets: Sequence[TokenizedRows], tokenizer: Tokenizer, table_rows: int) -> None:
    """`check_row_ids` of all sets. Tokens without a row are a notice of the first set.

    Raises:
        InputError: For the first row with such a token.
    """
    for rows in sets:
        check_row_ids(rows, table_rows, tokenizer)
    if notice := unused_notice(tokenizer, table_rows):
        sets[0].stats.notices.append(notice)


def check_row_ids(rows: TokenizedRows, table_rows: int, tokenizer: Tokenizer | None = None, *, model: str = "") -> None:
    """`check_ids` of all rows; the message names the row, after the `model` where there are several.

    Raises:
        InputError: For the first row with such an id.
    """
    ids = rows.input_ids
    if not ids.size or (ids.min() >= 0 and ids.max() < table_rows):
        return
    row = int(np.searchsorted(rows.offsets, _first_outside(ids, table_rows), side="right")) - 1
    check_ids(rows[row][0], table_rows, f"{model and f'{model}: '}{rows.where(row)}", tokenizer)


def unused_notice(tokenizer: Tokenizer, table_rows: int) -> str | None:
    """What the user should know of tokens that have no row, where `check_row_ids` has found none of them.

    Example:
        >>> from tokenizers import Tokenizer, models
        >>> from transformers import PreTrainedTokenizerFast
        >>> words = {"a": 0, "b": 1, "<call>": 2}
        >>> tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="a")))
        >>> unused_notice(tokenizer, 2)
        "the model's embedding has 2 rows, and none for 1 token of the tokenizer: '<call>' (2); rows and prompts with \
one are refused"
    """
    largest = max(len(tokenizer) - 1, max(tokenizer.added_tokens_decoder, default=0))
    if largest < table_rows:  # spares a dictionary of the whole vocabulary
        return None
    beyond = sorted((index, token) for token, index in tokenizer.get_vocab().items() if index >= table_rows)
    if not beyond:
        return None
    names = [f"{shown(token)} ({index})" for index, token in beyond[:_SHOWN]]
    return (
        f"the model's embedding has {table_rows:,} rows, and none for "
        f"{counted(len(beyond), 'token')} of the tokenizer: {', '.join(names)}"
        f"{', …' if len(beyond) > _SHOWN else ''}; rows and prompts with one are refused"
    )


def _first_outside(ids: Int[ndarray, "..."], table_rows: int) -> int:
    return int(np.argmax((ids < 0) | (ids >= table_rows)))


def _refusal(token: int, table_rows: int, tokenizer: Tokenizer | None) -> str:
    table = f"(ids 0 to {table_rows - 1})"
    if token < 0:
        return f"token id {token} is negative; the model's embedding has {table_rows:,} rows {table}"
    # The library's numbers have 32 bits.
    name = tokenizer.backend_tokenizer.id_to_token(token) if tokenizer is not None and token < 2**32 else None
    if tokenizer is None or name is None:
        return (
            f"token id {token} has no row in the model's embedding, which has {table_rows:,} {table}; take the ids of "
            "the checkpoint's own tokenizer"
        )
    has_no_row = f"token {shown(name)} has id {token}, and the model's embedding has {table_rows:,} rows {table}"
    spare = sorted(set(range(table_rows)).difference(tokenizer.get_vocab().values()))
    if not spare:
        return f"{has_no_row}, none of them without a token; give a checkpoint whose embedding has been resized"
    return (
        f"{has_no_row}, {len(spare):,} of them without a token: {_runs(spare)}; give the token one of these ids, or "
        "resize the embedding"
    )


def _runs(numbers: list[int]) -> str:
    """Rising numbers, those that follow one another as "7 to 9"."""
    runs = []
    for _, group in groupby(enumerate(numbers), lambda pair: pair[1] - pair[0]):
        run = [number for _, number in group]
        runs.append(f"{run[0]} to {run[-1]}" if len(run) > 1 else str(run[0]))
    return ", ".join(runs[:_SHOWN]) + (", …" if len(runs) > _SHOWN else "")
