"""What the tests of this folder share."""

import json
from pathlib import Path

import jax
import pytest

from phi3_jax.config.lora import LoraConfig
from phi3_jax.hf.checkpoint import Checkpoint
from phi3_jax.hf.save import save_model
from phi3_jax.lora import init_lora
from phi3_jax.peft.save import save_adapter
from tests.helpers.commands import ROW
from tests.helpers.models import tiny_model
from tests.helpers.tokenizers import JULY, phi3_tokenizer


@pytest.fixture(scope="session")
def base(tmp_path_factory) -> Path:
    """A whole checkpoint: a tiny random model in several shards, and a tokenizer with a chat template."""
    folder = tmp_path_factory.mktemp("checkpoint") / "base"
    tokenizer = phi3_tokenizer(JULY)
    model = tiny_model(vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id)
    save_model(model, folder, max_shard_size=40_000)
    tokenizer.save_pretrained(folder)
    assert len(list(folder.glob("model-*.safetensors"))) > 2
    return folder


@pytest.fixture
def chats(tmp_path) -> Path:
    file = tmp_path / "chats.jsonl"
    file.write_text("".join(json.dumps(ROW) + "\n" for _ in range(6)))
    return file


@pytest.fixture(scope="session")
def adapter(base, tmp_path_factory) -> Path:
    """An adapter that changes the model, since both its matrices are random."""
    folder = tmp_path_factory.mktemp("adapter") / "adapter"
    model = Checkpoint.open(base).load_model(dtype="float32")
    lora = init_lora(model, LoraConfig(r=4, init_lora_weights=False), jax.random.key(1))
    save_adapter(folder, lora, base_model_name_or_path=str(base))
    return folder
