"""Several processes: found out about, held together, fed, and their files those of a single one."""

import itertools
import json
import math
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax._src import cloud_tpu_init
from safetensors.numpy import load_file

from phi3_jax import InputError, Phi3Config, Phi3ForCausalLM
from phi3_jax.data import eval_batches, train_batches
from phi3_jax.hf.checkpoint import Checkpoint
from phi3_jax.hf.layout import checkpoint_layout
from phi3_jax.hf.save import save_model
from phi3_jax.parallel import distributed
from phi3_jax.training.checkpoints import Checkpoints
from phi3_jax.training.step import TrainState
from tests.helpers.distributed_inputs import BASE, BATCHES, BROKEN, DATA, rows, write_rows

ROOT = Path(__file__).parents[2]
UNREACHABLE = """
from phi3_jax.parallel.distributed import initialize
initialize("127.0.0.1:{port}", 2, {process}, timeout=1)
"""


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def start(arguments: list[str], devices: int, **variables: str) -> subprocess.Popen:
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        **variables,
    }
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, *arguments], env=environment, cwd=ROOT, **pipes)


def finish(processes: list[subprocess.Popen]) -> list[str]:
    """The processes' error output; kills those that are left when one hangs."""
    try:
        errors = [process.communicate(timeout=240)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return errors


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> dict[int, Path]:
    """The folders in which one process with 8 devices, and two with 4 each, did the same."""
    folders = {count: tmp_path_factory.mktemp(f"{count}-processes") for count in (1, 2)}
    port, processes = free_port(), []
    model = Phi3ForCausalLM(Phi3Config.from_dict(BASE), dtype=jnp.float32, rngs=nnx.Rngs(0))
    for count, folder in folders.items():
        save_model(model, folder / "base")
        write_rows(folder / "rows")
        for process in range(count):
            variables = {
                "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
                "JAX_NUM_PROCESSES": str(count),
                "JAX_PROCESS_ID": str(process),
            }
            processes.append(start(["-m", "tests.helpers.distributed_worker", str(folder)], 8 // count, **variables))
    errors = finish(processes)
    assert [process.returncode for process in processes] == [0, 0, 0], "\n".join(errors)
    return folders


@pytest.fixture(scope="module")
def found(run) -> list[dict]:
    """What the two processes saw."""
    return [json.loads((run[2] / f"found-{process}.json").read_text()) for process in range(2)]


def test_the_first_is_the_main_one(found, run):
    assert [(f["processes"], f["main"]) for f in found] == [(2, True), (2, False)]
    alone = json.loads((run[1] / "found-0.json").read_text())
    assert (alone["processes"], alone["main"]) == (1, True)


def test_processes_that_disagree_all_say_so(found):
    for process in found:
        assert process["same"] == "nothing"
        assert process["different"] == (
            "InputError: the processes disagree on configuration: 'learning_rate: 1e-4' in process 0, "
            "'learning_rate: 1e-5' in process 1; data: 'abcd' in process 0, 'abc' in process 1; "
            "start them all with the same"
        )
        assert "jax: '0.10.2' in process 0, '9.9' in process 1" in process["version"]
        assert "number of local devices: '4' in process 0, '5' in process 1" in process["devices"]


def test_what_one_process_raises_all_raise(found):
    assert [f["nobody"] for f in found] == ["nothing", "nothing"]
    assert [f["input"] for f in found] == [
        "InputError: process 1 failed: data.train is missing",
        "InputError: data.train is missing",
    ]
    assert [f["other"] for f in found] == [
        "OSError: [Errno 28] No space left",
        "RuntimeError: process 0 failed: [Errno 28] No space left",
    ]
    assert {f["barrier"] for f in found} == {"RuntimeError: the processes are at different barriers: at 0, at 1"}


def test_arrays_are_joined_in_the_order_of_processes(found):
    expected = [*(np.arange(3000) * 2**33), *(np.arange(5) * 2**33 + 1)]
    assert [f["joined"] for f in found] == 2 * [[expected, []]]


def test_processes_that_share_rows_make_what_one_makes(run, found):
    alone = json.loads((run[1] / "found-0.json").read_text())["prepared"]
    assert alone["made"] == [False, False]  # and then comes from the cache
    # Of two processes the second has lost its cache before the third time.
    assert [f["prepared"]["made"] for f in found] == [4 * [True], 4 * [True]]
    assert len(alone["rows"]) == 6
    for process in found:
        assert process["prepared"]["rows"] == alone["rows"]


def test_what_is_wrong_with_a_row_all_processes_tell_in_one_line(run, found):
    alone = json.loads((run[1] / "found-0.json").read_text())["prepared"]
    for kind, words in {"late": "", "both": "", "empty": "no usable rows"}.items():
        assert {f["prepared"][kind] for f in found} == {alone[kind]}
        assert alone[kind].startswith("InputError: ")
        assert words in alone[kind]
    assert "both.jsonl, row 6: " in alone["both"]
    assert "late.jsonl, row 51: " in alone["late"]
    for process in found:
        assert "the processes disagree on rows and what they depend on" in process["prepared"]["different"]
        assert "missing.jsonl: no such data file or folder" in process["prepared"]["missing"]


@pytest.mark.parametrize("count", [1, 2])
def test_batches_are_those_of_one_process(run, count):
    stream = train_batches(rows(), DATA, **BATCHES)
    next(stream)
    expected = {f"train {name}": array for name, array in next(stream).items()}
    evaluation = next(iter(eval_batches(rows(), DATA, batch_size=4, pad_id=0)))
    expected |= {f"eval {name}": array for name, array in evaluation.items()}
    for process in range(count):
        with np.load(run[count] / f"batches-{process}.npz") as seen:
            # Of two processes each holds every other row.
            assert seen["part"].tolist() == ([0, 1, 2, 3] if count == 1 else [process, 2 + process])
            assert set(seen) - {"part"} == set(expected)
            for name, array in expected.items():
                np.testing.assert_array_equal(seen[name], array)


def test_each_process_reads_what_its_devices_hold(run, found):
    tensors = load_file(run[2] / "base" / "model.safetensors")
    norms = sum(tensor.nbytes for name, tensor in tensors.items() if "norm" in name)
    others = sum(tensor.nbytes for name, tensor in tensors.items() if "norm" not in name)
    assert [f["bytes"] for f in found] == [norms + others // 2] * 2
    # Two devices hold each share, and it is read once.
    assert json.loads((run[1] / "found-0.json").read_text())["bytes"] == norms + others


def test_the_host_holds_one_share_at_a_time(found):
    qkv = 3 * 128 * 64 * 4  # bytes of the largest array, of which fsdp x tensor make four shares
    assert [f["largest"] for f in found] == [qkv // 4] * 2


def test_parts_and_quantized_weights_are_shared(run, found):
    for seen in [*found, json.loads((run[1] / "found-0.json").read_text())]:
        assert seen["parts"] == [[[3, 64, 64], [3, 16, 64]], [[3, 32, 64], [3, 8, 64]], [[3, 32, 64], [3, 8, 64]]]
        assert seen["codes"] == [3, 64 // 2, 64 // 2]  # over fsdp; two codes a byte


@pytest.mark.parametrize("count", [1, 2])
def test_what_is_saved_is_what_one_device_saves(run, tmp_path, count):
    folder = run[count]
    base = load_file(folder / "base" / "model.safetensors")
    parted = load_file(folder / "parted" / "model.safetensors")
    shards = list((folder / "saved").glob("model-*.safetensors"))
    saved = dict(itertools.chain.from_iterable(load_file(shard).items() for shard in shards))
    assert len(shards) > 1
    for tensors in (saved, parted):
        assert set(tensors) == set(base)
        assert all(tensors[name].tobytes() == base[name].tobytes() for name in base)
    save_model(Checkpoint.open(folder / "base").load_model(dtype=jnp.float32, quantization="nf4"), tmp_path)
    name = "model.safetensors"
    assert (folder / "quantized" / name).read_bytes() == (tmp_path / name).read_bytes()


def test_a_refused_folder_is_refused_by_all(found):
    first, second = (f["occupied"] for f in found)
    assert first.startswith("InputError: ")
    assert "holds an adapter" in first
    assert second == first.replace("InputError: ", "InputError: process 0 failed: ")


@pytest.mark.parametrize("count", [1, 2])
def test_checkpoints_are_restored_on_any_mesh(run, found, count):
    weights = np.arange(32.0).reshape(4, 8)
    for seen in found:  # saved over fsdp and tensor, restored over data and fsdp
        assert (seen["progress"], seen["step"]) == ({"step": 1}, 1)
        assert "'data', 'fsdp'" in seen["spec"]
        np.testing.assert_array_equal(seen["lora"], weights)
    checkpoints = Checkpoints(run[count] / "checkpoints", None)
    assert checkpoints.steps == [1, 2]
    like = TrainState.create({"lora": {"A": jnp.zeros((4, 8))}}, optax.adam(1e-3), jax.random.key(0))
    restored, progress = checkpoints.restore(like)
    checkpoints.close()
    assert progress == {"step": 2}
    assert restored.step == 2
    assert restored.key == jax.random.key(3)
    assert restored.trainable["lora"]["A"].sharding == like.trainable["lora"]["A"].sharding
    np.testing.assert_array_equal(restored.trainable["lora"]["A"], 2 * weights)


def test_processes_that_do_not_come_are_told_in_one_line():
    ports = [free_port(), free_port()]
    both = [start(["-c", UNREACHABLE.format(port=port, process=i)], 1) for i, port in enumerate(ports)]
    for process, error in enumerate(finish(both)):
        where = (
            f"process {process}: not all 2 processes reached the coordinator at 127.0.0.1:{ports[process]} within 1 s"
        )
        assert where in error
        assert both[process].returncode == 1  # as after any exception; JAX would have aborted


@pytest.fixture
def alone(monkeypatch):
    """An environment that speaks of no cluster."""
    for name in list(os.environ):
        if name.startswith(("SLURM_", "TPU_", "MEGASCALE_", "KUBERNETES_", "JOB_COMPLETION_", "OMPI_", "JAX_COORD")):
            monkeypatch.delenv(name)
    monkeypatch.setattr(cloud_tpu_init, "running_in_cloud_tpu_vm", False)
    platforms = jax.config.jax_platforms
    jax.config.update("jax_platforms", None)
    yield monkeypatch
    jax.config.update("jax_platforms", platforms)


SLURM = {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_NODELIST": "node[1-2]",
    "SLURM_NTASKS": "2",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
}
GKE = {"TPU_WORKER_HOSTNAMES": "a,b", "TPU_WORKER_ID": "0"}
POD = {"KUBERNETES_SERVICE_HOST": "10.0.0.1"}


@pytest.mark.parametrize(
    ("variables", "on_tpu", "cluster"),
    [
        ({}, False, None),
        (SLURM, False, "SLURM"),
        ({**SLURM, "SLURM_NTASKS": "1"}, False, None),
        ({**SLURM, "SLURM_STEP_NUM_TASKS": "1"}, False, None),  # a shell in an allocation for two
        ({name: SLURM[name] for name in SLURM if name != "SLURM_STEP_NODELIST"}, False, None),  # a batch script
        (GKE, True, "GKE"),
        (GKE, False, None),
        ({**GKE, "TPU_WORKER_HOSTNAMES": "localhost"}, True, None),
        ({**GKE, "TPU_WORKER_HOSTNAMES": "a", "MEGASCALE_NUM_SLICES": "2"}, True, "GKE"),
        ({**GKE, **POD, "JOB_COMPLETION_INDEX": "0"}, True, "GKE"),
        ({}, True, "TPU VM"),
        ({"TPU_SKIP_MDS_QUERY": "1"}, True, None),
        (POD, False, None),
    ],
)
def test_clusters_are_told_from_the_environment(alone, variables, on_tpu, cluster):
    for name, value in variables.items():
        alone.setenv(name, value)
    alone.setattr(cloud_tpu_init, "running_in_cloud_tpu_vm", on_tpu)
    started = []
    alone.setattr(jax.distributed, "initialize", lambda **settings: started.append(settings))
    assert distributed.detect_cluster() == cluster
    distributed.initialize()
    # What JAX detects is left to JAX.
    assert started == ([] if cluster is None else [{"initialization_timeout": 360}])


def test_a_tpu_that_is_not_used(alone):
    alone.setattr(cloud_tpu_init, "running_in_cloud_tpu_vm", True)
    jax.config.update("jax_platforms", "cpu")
    assert distributed.detect_cluster() is None


@pytest.mark.parametrize("installed", [True, False])
def test_a_pod_of_an_indexed_job(alone, installed, caplog):
    for name, value in {**POD, "JOB_COMPLETION_INDEX": "1"}.items():
        alone.setenv(name, value)
    alone.setattr(distributed.importlib.util, "find_spec", lambda name: installed or None)
    assert distributed.detect_cluster() == ("Kubernetes" if installed else None)
    assert ("runs by itself" in caplog.text) != installed


def test_settings_that_are_given_are_what_jax_gets(alone):
    started = []
    alone.setattr(jax.distributed, "initialize", lambda **settings: started.append(settings))
    for name, value in {**SLURM, "JAX_NUM_PROCESSES": "3", "JAX_PROCESS_ID": "1"}.items():
        alone.setenv(name, value)
    alone.setenv("JAX_INITIALIZATION_TIMEOUT", "7.5")
    distributed.initialize("host:123", process_id=2)  # arguments go before variables
    settings = {"coordinator_address": "host:123", "num_processes": 3, "process_id": 2}
    assert started == [{**settings, "cluster_detection_method": "deactivate", "initialization_timeout": 68}]
    distributed.initialize("host:123", 1, 0)  # of one process
    assert len(started) == 1


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"ADDRESS": "host:1"}, "JAX_COORDINATOR_ADDRESS host:1 given without JAX_NUM_PROCESSES and JAX_PROCESS_ID"),
        ({"COUNT": "2", "ID": "0"}, "JAX_NUM_PROCESSES 2, JAX_PROCESS_ID 0 given without JAX_COORDINATOR_ADDRESS"),
        ({"ADDRESS": "host", "COUNT": "2", "ID": "0"}, "'host', expected host:port"),
        ({"ADDRESS": "host:123456", "COUNT": "2", "ID": "0"}, "expected host:port"),
        ({"ADDRESS": "host:1", "COUNT": "2", "ID": "2"}, "JAX_PROCESS_ID is 2 of JAX_NUM_PROCESSES 2, expected 0 to 1"),
        ({"ADDRESS": "host:1", "COUNT": "two", "ID": "0"}, "JAX_NUM_PROCESSES is 'two', expected a whole number"),
        ({"TIMEOUT": "soon"}, "JAX_INITIALIZATION_TIMEOUT is 'soon'"),
    ],
)
def test_wrong_settings(alone, variables, message):
    for name, value in variables.items():
        alone.setenv(getattr(distributed, name), value)
    with pytest.raises(InputError, match=message):
        distributed.initialize()


def test_what_jax_cannot_start_is_told(alone):
    def broken(**settings):
        raise ValueError("Number of processes must be defined.\nmore")

    for name, value in SLURM.items():
        alone.setenv(name, value)
    alone.setattr(jax.distributed, "initialize", broken)
    with pytest.raises(
        InputError, match=r"^SLURM: .* \(ValueError: Number of processes must be defined\.\); see to"
    ) as caught:
        distributed.initialize()
    assert "\n" not in str(caught.value)


def test_hosts_that_hold_the_same_read_a_share_each(run, found):
    """With `data` between two processes; of three layers each reads two, since the last group begins one earlier."""
    alone = json.loads((run[1] / "found-0.json").read_text())["shared"]
    assert alone["differ"] == []
    layers = sum(4 * math.prod(e.shape) for e in checkpoint_layout(Phi3Config.from_dict(BASE)) if e.layer is not None)
    others = alone["dense"] - layers
    for process in found:
        assert process["shared"]["differ"] == []
        assert process["shared"]["dense"] == process["shared"]["split"] == 2 * layers // 3 + others // 2
    # Each looks at the first layer for the kind of weight; the one that it belongs to does not read it again.
    assert found[0]["shared"]["nf4"] < 0.8 * alone["nf4"]
    assert found[1]["shared"]["nf4"] < alone["nf4"]


def test_what_one_host_cannot_read_all_are_told(found):
    why = f"model.safetensors: {BROKEN} holds 512 NaN or infinity"  # of a device's part
    assert why in found[1]["shared"]["broken"]
    assert found[0]["shared"]["broken"].startswith("InputError: process 1 failed: ")
    assert why in found[0]["shared"]["broken"]
