"""Rows and batches of random tokens, and files of chats."""

import json
import random
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from phi3_jax.data import DataStats, TokenizedRows
from tests.helpers.models import VOCAB


def random_rows(lengths: list[int], width: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Right-padded rows of random tokens `[rows, width]`; a random half of the tokens are targets."""
    rng = np.random.default_rng(seed)
    shape = len(lengths), width
    real = np.arange(width) < np.array(lengths)[:, None]
    ids = np.where(real, rng.integers(1, VOCAB, shape), 0).astype(np.int32)
    mask = real & (rng.random(shape) < 0.5)
    mask[:, 0] = False
    return {
        "input_ids": ids,
        "positions": np.where(real, np.arange(width), 0).astype(np.int32),
        "segment_ids": real.astype(np.int32),
        "loss_mask": mask.astype(np.int32),
    }


def accumulated(rows: dict[str, np.ndarray], accumulation: int) -> dict[str, jax.Array]:
    """`[rows, width]` -> `[accumulation, rows / accumulation, width]`, on the device."""
    return {name: jnp.asarray(x.reshape(accumulation, -1, x.shape[-1])) for name, x in rows.items()}


def write_chats(path: Path, number: int = 13, seed: int = 0) -> Path:
    """Questions whose answers repeat their last word, in rows of different lengths."""
    rng = random.Random(seed)
    with path.open("w") as file:
        for _ in range(number):
            words = ["".join(rng.choices("abc", k=rng.randint(1, 3))) for _ in range(rng.randint(1, 5))]
            row = {
                "messages": [{"role": "user", "content": " ".join(words)}, {"role": "assistant", "content": words[-1]}]
            }
            file.write(json.dumps(row) + "\n")
    return path


def make_rows(lengths):
    """Row i consists of the token 100 + i."""
    ids = np.concatenate([np.full(n, 100 + i, np.int32) for i, n in enumerate(lengths)])
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    mask = np.ones(len(ids), np.uint8)
    mask[offsets[:-1]] = 0
    none = np.zeros(len(lengths), np.int32)
    return TokenizedRows(ids, mask, offsets, none, [""] * len(lengths), DataStats())
