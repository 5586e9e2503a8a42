"""Models, rows and adapters whose numbers are not finite."""

import json
from dataclasses import replace
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file, save_file

from phi3_jax.lora import Lora
from tests.helpers.rows import random_rows
from tests.helpers.tokenizers import tiny_tokenizer

POISON = 52  # a token that no other row has


def good_rows(seed=0):
    rows = random_rows([16, 12], 16, seed)
    rows["input_ids"][rows["input_ids"] == POISON] = 1
    return rows


def bad_rows():
    rows = good_rows(9)
    rows["input_ids"][1, 2] = POISON
    return rows


def overflowing(lora: Lora) -> Lora:
    """A of zeros and B so large that A's gradient is infinite: the update is zero all the same."""
    (name, adapter) = next(iter(lora.items()))
    large = replace(adapter, lora_A=0 * adapter.lora_A, lora_B=jnp.full_like(adapter.lora_B, 3e38))
    return Lora.from_items({name: large}, lora.config)


LETTER = "z"  # in no row of `write_chats`


def poison(folder: Path) -> Path:
    # Finite weights, of which a value becomes infinite where the letter's own feature is there.
    plant(folder / "base", "model.embed_tokens.weight", np.s_[:, 0], 0)
    plant(folder / "base", "model.embed_tokens.weight", (tiny_tokenizer().convert_tokens_to_ids(LETTER), 0), 9)
    plant(folder / "base", "model.layers.0.self_attn.qkv_proj.weight", (-1, 0), 3e38)
    lines = (folder / "chats.jsonl").read_text().splitlines()
    row = json.loads(lines[3])
    row["messages"][0]["content"] += f" {LETTER}"
    lines[3] = json.dumps(row)
    (folder / "chats.jsonl").write_text("\n".join(lines))
    return folder


def plant(base: Path, name: str, index, value) -> None:
    path = next(base.glob("*.safetensors"))
    tensors = {key: tensor.copy() for key, tensor in load_file(path).items()}
    tensors[name][index] = value
    save_file(tensors, path, metadata={"format": "pt"})
