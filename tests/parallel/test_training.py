"""Training on meshes of simulated devices and by several processes, held against one device."""

import itertools
import json
import math
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from phi3_jax.system.errors import InputError
from phi3_jax.system.manifest import check
from phi3_jax.training.loop import train
from tests.helpers.mesh_runs import config, losses, write_inputs

ONE = [1, 1, 1, 1]
CUBE = [2, 2, 2, 1]
# Losses are sums in another order: some units in the last place of a float32 near 4, six steps on.
TOLERANCE = 1e-5
# What Gloo's threads print when processes meet, in pieces that may fall into one another.
GLOO = re.compile(r"\[Gloo\] Rank | is connected to | peer ranks\. |Expected number of connected peer ranks is : |\d+")


def start(folder: Path, meshes: list[list[int]], devices: int, *options: str, **variables: str) -> subprocess.Popen:
    flags = f"--xla_force_host_platform_device_count={devices} --xla_cpu_multi_thread_eigen=false"
    return subprocess.Popen(
        [sys.executable, "-m", "tests.helpers.mesh_runs", str(folder), json.dumps(meshes), *options],
        env={**os.environ, "XLA_FLAGS": flags, "JAX_DISABLE_MOST_OPTIMIZATIONS": "true", **variables},
        cwd=Path(__file__).parents[2],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def start_two(folder: Path, *options: list[str]) -> list[subprocess.Popen]:
    """Two processes of four devices, each with its own options."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    together = {"JAX_COORDINATOR_ADDRESS": f"localhost:{port}", "JAX_NUM_PROCESSES": "2"}
    return [
        start(folder, [CUBE], 4, *own, **together, JAX_PROCESS_ID=str(process)) for process, own in enumerate(options)
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Runs on one device and on a mesh of eight."""
    folder = tmp_path_factory.mktemp("meshes")
    write_inputs(folder)
    run_on(folder, ONE, CUBE)
    return folder


def run_on(folder: Path, *meshes: list[int], **variables: str) -> None:
    process = start(folder, list(meshes), 8, **variables)
    _, errors = process.communicate(timeout=1200)
    assert process.returncode == 0, errors


@pytest.mark.parametrize("mesh", ["2_2_2_1", pytest.param("1_1_2_4", marks=pytest.mark.slow)])
def test_a_mesh_trains_as_one_device_does(folder, mesh):
    if not (folder / mesh).exists():
        run_on(folder, [int(size) for size in mesh.split("_")])
    one = losses(folder / "1_1_1_1")
    assert len(one) == 6
    assert one[-1] < 0.8 * one[0]
    np.testing.assert_allclose(losses(folder / mesh), one, rtol=0, atol=TOLERANCE)
    expected = load_file(folder / "1_1_1_1/adapter/adapter_model.safetensors")
    adapter = load_file(folder / mesh / "adapter/adapter_model.safetensors")
    assert adapter.keys() == expected.keys()
    for name, weight in expected.items():
        # AdamW divides by the root of the second moment, so where a gradient is nearly zero its last
        # bits decide a step of up to the learning rate (1e-2); elsewhere they do not show.
        np.testing.assert_allclose(adapter[name], weight, rtol=0, atol=1e-3, err_msg=name)


def test_a_checkpoint_of_a_mesh_resumes_on_one_device(folder):
    shutil.copytree(folder / "2_2_2_1", folder / "resumed")
    shutil.rmtree(folder / "resumed/checkpoints/6")
    shutil.rmtree(folder / "resumed/adapter")
    train(config(folder, ONE, "resumed", resume_from_checkpoint=True))
    np.testing.assert_allclose(losses(folder / "resumed"), losses(folder / "1_1_1_1"), rtol=0, atol=TOLERANCE)


def test_more_rows_a_step_are_refused_on_resuming(folder):
    shutil.copytree(folder / "2_2_2_1", folder / "other_rows")
    shutil.rmtree(folder / "other_rows/checkpoints/6")
    with pytest.raises(InputError, match="other training rows, batch sizes or seed"):
        train(config(folder, ONE, "other_rows", resume_from_checkpoint=True, per_device_train_batch_size=2))


def test_two_processes_train_as_one_does(folder):
    options = ["--logging.progress", "true", "--logging.profile", "3:5"]
    processes = start_two(folder, options, options)
    outputs = [process.communicate(timeout=600) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    np.testing.assert_allclose(losses(folder / "hosts"), losses(folder / "1_1_1_1"), rtol=0, atol=TOLERANCE)
    first, second = (output for output, _ in outputs)
    assert "on 8 cpu devices (data 2, fsdp 2, tensor 2)" in first
    assert "step 6/6" in first
    assert not GLOO.sub("", second).strip()
    for name in ("adapter_model.safetensors", "adapter_config.json", "tokenizer.json"):
        whole = (folder / "hosts/adapter" / name).read_bytes()
        assert (folder / "hosts/checkpoints/6" / name).read_bytes() == whole
    assert (folder / "hosts/report.html").exists()
    profiles = (folder / "hosts/profile").glob("*/plugins/profile/*/*.xplane.pb")
    assert sorted(file.relative_to(folder / "hosts/profile").parts[0] for file in profiles) == ["host-0", "host-1"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", [{"use_dora": True}, {"init_lora_weights": "pissa"}, {"init_lora_weights": "olora"}])
def test_two_processes_train_other_kinds_as_one_does(folder, kind):
    """Kinds whose start is computed from weights that no process has whole. On the same mesh: a decomposition
    differs in its last bits from that on one device, and six large steps make that show."""
    ((name, value),) = kind.items()
    one, two = folder / f"one_{value}", folder / f"two_{value}"
    options = [[f"--peft.{name}", str(value).lower(), "--training.output_dir", str(output)] for output in (one, two)]
    alone = start(folder, [CUBE], 8, *options[0])
    outputs = [alone.communicate(timeout=600)]
    pair = start_two(folder, options[1], options[1])
    outputs += [process.communicate(timeout=600) for process in pair]
    assert [process.returncode for process in (alone, *pair)] == [0, 0, 0], outputs
    assert losses(one)[-1] < losses(one)[0] - 0.1
    np.testing.assert_allclose(losses(two), losses(one), rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_signal_to_one_process_stops_both_after_the_same_step(folder, number):
    output = folder / f"stopped{number}"
    options = ["--training.output_dir", str(output), "--training.max_steps", "5000", "--training.save_steps", "5000"]
    options += ["--training.eval_generations", "0"]
    processes = start_two(folder, options, options)
    deadline = time.monotonic() + 300
    while not (output / "metrics.jsonl").exists() or len(losses(output)) < 3:
        assert all(process.poll() is None for process in processes), [process.communicate() for process in processes]
        assert time.monotonic() < deadline
        time.sleep(0.05)
    processes[1].send_signal(number)
    outputs = [process.communicate(timeout=300) for process in processes]
    assert [process.returncode for process in processes] == [143, 143], outputs
    (saved,) = (path for path in (output / "checkpoints").iterdir())
    check(saved, thoroughly=True)
    assert 3 <= int(saved.name) < 5000
    assert f"stopped: saved the checkpoint of step {saved.name};" in outputs[0][0]
    assert len(losses(output)) == int(saved.name)
    assert not (output / "adapter").exists()


def test_processes_that_disagree_both_say_so(folder):
    options = [["--training.learning_rate", rate, "--training.output_dir", str(folder / "no")] for rate in ("1", "2")]
    processes = start_two(folder, *options)
    for process in processes:
        _, errors = process.communicate(timeout=600)
        lines = [line for line in errors.splitlines() if line.startswith("phi3-jax: ")]
        assert process.returncode == 2, errors
        assert len(lines) == 1
        assert "disagree on configuration: 'learning_rate: 1.0' in process 0, 'learning_rate: 2.0'" in lines[0]
    assert not (folder / "no").exists()


@pytest.mark.slow
def test_every_mesh_of_eight_devices(folder):
    shapes = [shape for shape in itertools.product((1, 2, 4, 8), repeat=4) if math.prod(shape) == 8]
    assert len(shapes) == 20
    missing = [list(shape) for shape in shapes if not (folder / "_".join(map(str, shape))).exists()]
    run_on(folder, *missing, JAX_DISABLE_MOST_OPTIMIZATIONS="false")  # the programs that users run
    one = losses(folder / "1_1_1_1")
    for shape in shapes:
        np.testing.assert_allclose(losses(folder / "_".join(map(str, shape))), one, rtol=0, atol=TOLERANCE)
