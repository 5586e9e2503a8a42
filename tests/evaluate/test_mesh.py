"""An evaluation over several devices is that of one."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import pytest

from phi3_jax.hf.checkpoint import Checkpoint
from phi3_jax.peft.save import save_adapter
from tests.helpers.models import random_lora, tiny_model
from tests.helpers.rows import write_chats
from tests.helpers.tokenizers import tiny_tokenizer

MESHES = [[1, 1, 1, 1], [2, 2, 1, 1], [1, 2, 2, 1]]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("meshes")
    tiny_model(2, bos_token_id=1, eos_token_id=2, num_key_value_heads=4).save_pretrained(str(folder / "base"))
    tiny_tokenizer().save_pretrained(folder / "base")
    model = Checkpoint.open(folder / "base").load_model(dtype=jnp.float32)
    save_adapter(folder / "adapter", random_lora(model), base_model_name_or_path="base")
    write_chats(folder / "chats.jsonl", number=11)
    return folder


@pytest.mark.slow
def test_two_processes_evaluate_as_one_does(inputs):
    command = [sys.executable, "-c", "import sys; from phi3_jax.cli import main; sys.exit(main())", "evaluate"]
    command += ["--model", inputs / "base", "--adapter", f"adapter={inputs}/adapter", "--data", inputs / "chats.jsonl"]
    command += ["--metrics", "loss,chrf", "--max-new-tokens", "6", "--batch-size", "2", "--max-length", "32"]
    subprocess.run([*command, "--output_dir", inputs / "one"], check=True, capture_output=True)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    together = {"JAX_COORDINATOR_ADDRESS": f"localhost:{port}", "JAX_NUM_PROCESSES": "2"}
    together["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2"
    processes = [
        subprocess.Popen(
            [*command, "--output_dir", inputs / "two", "--parallel.fsdp", "-1"],
            env={**os.environ, **together, "JAX_PROCESS_ID": str(process)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for process in range(2)
    ]
    outputs = [process.communicate(timeout=600) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert "report.html" in outputs[0][0]
    assert "report.html" not in outputs[1][0]  # the first alone writes
    for name in ("base", "adapter"):
        one, two = (
            {row["id"]: row for row in map(json.loads, (inputs / run / f"predictions/{name}.jsonl").open())}
            for run in ("one", "two")
        )
        assert sorted(one) == sorted(two) == list(range(11))
        for row in one:
            assert one[row]["answer"] == two[row]["answer"]
            assert one[row]["scores"]["loss"] == pytest.approx(two[row]["scores"]["loss"], rel=1e-5)


@pytest.mark.slow
def test_a_mesh_evaluates_as_one_device_does(inputs):
    process = subprocess.run(
        [sys.executable, "-m", "tests.helpers.mesh_evaluation", str(inputs), json.dumps(MESHES)],
        env={**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=4"},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    found = json.loads((inputs / "found.json").read_text())
    for mesh in ("2_2_1_1", "1_2_2_1"):
        for name in ("base", "adapter"):
            for ours, one in zip(found[mesh][name], found["1_1_1_1"][name], strict=True):
                assert ours["scores"]["loss"] == pytest.approx(one["scores"]["loss"], rel=1e-5)
                assert ours["answer"] == one["answer"]
