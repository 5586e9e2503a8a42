"""Every assistant turn of a conversation looked at by itself, with what stands before it."""

from dataclasses import replace

import numpy as np
from jaxtyping import Int, UInt8
from numpy import ndarray

from phi3_jax.data.rows import Origins, TokenizedRows
from phi3_jax.data.tokenizer import Tokenizer
from phi3_jax.generation.tokens import decode
from phi3_jax.system.errors import InputError


def every_turn(rows: TokenizedRows, tokenizer: Tokenizer, max_length: int | None) -> TokenizedRows:
    """A row for each assistant turn of each row, which ends with it; no other turn of it is a target.

    All of them together have the targets that the rows have, but for a turn that was cut at `max_length`: of that
    nobody knows the whole, and it is left out.

    Args:
        rows: Conversations whose targets are the assistant's turns.
        tokenizer: Of the rows.
        max_length: At which rows were cut.

    Raises:
        InputError: No turn is left.
    """
    parts: list[tuple[int, int, int, str]] = []  # row, where the turn begins and ends, its text
    for index in range(len(rows)):
        ids, mask = rows[index]
        for start, end in _runs(mask):
            if start == rows.prompt_lengths[index]:
                parts.append((index, start, end, rows.references[index]))
            elif max_length is None or end < max_length:
                parts.append((index, start, end, decode(tokenizer, ids[start:end].tolist()).strip()))
    if not parts:
        raise InputError(f"every assistant turn is cut at data.max_length {max_length}; raise that")
    row_ids = [rows[index][0][:end] for index, _, end, _ in parts]
    offsets = np.concatenate([[0], np.cumsum([end for _, _, end, _ in parts])])
    mask = np.zeros(int(offsets[-1]), np.uint8)
    for offset, (_, start, end, _) in zip(offsets.tolist(), parts, strict=False):
        mask[offset + start : offset + end] = 1
    stats = replace(
        rows.stats,
        rows=len(parts),
        tokens=len(mask),
        target_tokens=int(mask.sum()),
        notices=[*rows.stats.notices, f"each of {len(parts):,} assistant turns of {len(rows):,} rows is a row here"],
    )
    chosen = np.array([index for index, *_ in parts])
    origins = rows.origins
    return TokenizedRows(
        np.concatenate(row_ids),
        mask,
        offsets,
        np.array([start for _, start, _, _ in parts], np.int32),
        [text for *_, text in parts],
        stats,
        None if origins is None else Origins(origins.names, origins.source[chosen], origins.number[chosen]),
    )


def _runs(mask: UInt8[ndarray, "tokens"]) -> list[tuple[int, int]]:
    """Where targets begin, and where they end."""
    edges: Int[ndarray, "edges"] = np.flatnonzero(np.diff(mask.astype(np.int8), prepend=0, append=0))
    return [(int(start), int(end)) for start, end in edges.reshape(-1, 2)]
