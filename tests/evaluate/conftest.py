"""What the tests of this folder share."""

from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from phi3_jax.hf.checkpoint import Checkpoint
from phi3_jax.lora import merge_lora
from phi3_jax.peft.adapter import load_adapter
from phi3_jax.peft.save import save_adapter
from tests.helpers.checkpoints import write_checkpoint
from tests.helpers.evaluations import ROWS
from tests.helpers.models import random_lora
from tests.helpers.rows import write_chats
from tests.helpers.tokenizers import tiny_tokenizer


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    """`base` with two adapters, one of them merged too, and chats whose answers are their last word."""
    folder = tmp_path_factory.mktemp("evaluate")
    write_checkpoint(folder / "base")
    write_chats(folder / "chats.jsonl", number=ROWS)
    model = Checkpoint.open(folder / "base").load_model(dtype=jnp.float32)
    one = random_lora(model)
    for name, lora in (("one", one), ("two", jax.tree.map(lambda x: x / 2, one))):
        save_adapter(folder / name / "adapter", lora, base_model_name_or_path=str(folder / "base"))
    merged = merge_lora(model, load_adapter(folder / "one" / "adapter", model))
    merged.save_pretrained(str(folder / "merged"))
    tiny_tokenizer().save_pretrained(folder / "merged")
    return folder
