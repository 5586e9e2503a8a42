"""An evaluation over several devices is that of one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import pytest

from phi3_jax.hf.checkpoint import load_model
from phi3_jax.hf.peft import save_adapter
from tests.training.tiny import random_lora, tiny_model, tiny_tokenizer, write_chats

MESHES = [[1, 1, 1, 1], [2, 2, 1, 1], [1, 2, 2, 1]]


@pytest.mark.slow
def test_a_mesh_evaluates_as_one_device_does(tmp_path):
    tiny_model(2, bos_token_id=1, eos_token_id=2, num_key_value_heads=4).save_pretrained(str(tmp_path / "base"))
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    model = load_model(tmp_path / "base", dtype=jnp.float32)
    save_adapter(tmp_path / "adapter", random_lora(model), base_model_name_or_path="base")
    write_chats(tmp_path / "chats.jsonl", number=11)
    process = subprocess.run(
        [sys.executable, "-m", "tests.evaluate.meshed", str(tmp_path), json.dumps(MESHES)],
        env={**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=4"},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    for mesh in ("2_2_1_1", "1_2_2_1"):
        for name in ("base", "adapter"):
            for ours, one in zip(found[mesh][name], found["1_1_1_1"][name], strict=True):
                assert ours["scores"]["loss"] == pytest.approx(one["scores"]["loss"], rel=1e-5)
                assert ours["answer"] == one["answer"]
