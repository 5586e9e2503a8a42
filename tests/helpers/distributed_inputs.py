"""What the processes of test_distributed.py and the test itself start from."""

import json
from pathlib import Path

import numpy as np

from phi3_jax.config.sections import DataSection
from phi3_jax.data import DataStats, TokenizedRows
from tests.helpers.rows import write_chats

BASE = {
    "model_type": "phi3",
    "vocab_size": 48,
    "hidden_size": 64,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
BROKEN = "model.layers.2.mlp.down_proj.weight"  # of a checkpoint that one process finds spoilt
DATA = DataSection(packing=False, max_length=256)
CHATS = DataSection(train="chats.jsonl", eval_fraction=0.2, max_length=24)
BATCHES = {"batch_size": 4, "accumulation": 2, "epochs": 1, "seed": 5, "pad_id": 0}


def rows() -> TokenizedRows:
    """Rows of lengths that need buckets of different sizes."""
    random = np.random.default_rng(0)
    lengths = random.integers(1, 200, 20)
    ids = random.integers(1, 40, lengths.sum()).astype(np.int32)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    none = np.zeros(len(lengths), np.int32)
    return TokenizedRows(ids, np.ones(len(ids), np.uint8), offsets, none, [""] * len(lengths), DataStats())


def write_rows(folder: Path) -> None:
    """Files of chats, some with rows that are wrong in the first or in the second half."""
    folder.mkdir()
    lines = write_chats(folder / "chats.jsonl", number=61).read_text().splitlines(keepends=True)
    wrong = json.dumps({"messages": [{"role": "user", "content": "a"}]}) + "\n"
    (folder / "late.jsonl").write_text("".join([*lines[:50], wrong, *lines[50:], wrong]))
    (folder / "both.jsonl").write_text("".join([*lines[:5], wrong, *lines[5:], wrong]))
    (folder / "empty.jsonl").write_text(10 * wrong)
    for process in range(2):
        (folder / str(process)).mkdir()
        (folder / str(process) / "different.jsonl").write_text("".join(lines[process:]))
    (folder / "0" / "missing.jsonl").write_text("".join(lines))
