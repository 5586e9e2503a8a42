"""What compiled steps say: of collectives in HLO text, and, slowly, of real programs for a CPU and for TPUs."""

import gzip
import importlib.util
import re

import numpy as np
import pytest

from phi3_jax.performance.compile import compile_elsewhere, compile_here
from phi3_jax.performance.memory import Estimator
from phi3_jax.performance.topology import parse_topology
from tests.helpers.plans import MINI, SMALL, checkpoint, run_of

needs_libtpu = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")


@pytest.mark.slow
@pytest.mark.parametrize("axis", ["data", "fsdp", "tensor", "context"])
def test_a_layer_sends_what_its_sharding_needs(tmp_path, monkeypatch, axis):
    """On 4 simulated devices: weights are gathered in each direction, k and v too, their gradients scattered."""
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=4")
    raw = {**SMALL, "num_key_value_heads": 4}
    run, config = run_of(
        raw,
        model={"name_or_path": checkpoint(tmp_path / "small", raw), "dtype": "float32"},
        data={"max_length": 512},
        training={"per_device_train_batch_size": 1},
        parallel={axis: 4},
    )
    found = compile_elsewhere(run, config, "cpu").collectives
    kinds = {
        loop: {kind: sum(n for what, n in counts.items() if what.startswith(kind)) for kind in KINDS}
        for loop, counts in found.items()
    }
    weights = 4 if axis in ("fsdp", "context") else 0
    keys = 2 if axis == "context" else 0
    if axis == "tensor":  # one sum after attention and one after the MLP; going back, that of attention again
        assert kinds["forward"] == {**dict.fromkeys(KINDS, 0), "all-reduce": 2}
        assert kinds["backward"]["all-reduce"] == 3
        # Gradients of what is cut of the adapters' B are gathered; nothing else is sent around.
        assert kinds["backward"]["all-to-all"] == kinds["backward"]["collective-permute"] == 0
        return
    assert kinds["forward"] == {**dict.fromkeys(KINDS, 0), "all-gather": weights + keys}
    # The gradients of adapters are summed once a step, outside of the layers.
    needed = {"all-gather": weights + keys, "reduce-scatter": keys}
    assert kinds["backward"] == {**dict.fromkeys(KINDS, 0), **needed}


KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["none", "dots", "full"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_estimate_on_a_cpu_is_within_a_third(tmp_path, dtype, policy):
    raw = {**MINI, "hidden_size": 512, "intermediate_size": 1344, "num_hidden_layers": 8}
    raw |= {"num_attention_heads": 4, "num_key_value_heads": 4}
    run, config = run_of(
        raw,
        model={"name_or_path": checkpoint(tmp_path / "model", raw), "dtype": dtype},
        data={"max_length": 512},
        training={"per_device_train_batch_size": 2, "remat_policy": policy},
    )
    compiled = compile_here(run, config, "cpu")
    assert 0.75 <= Estimator(config)(run, parse_topology("cpu")).total / compiled.bytes_per_device <= 1.33


@pytest.mark.slow
@needs_libtpu
def test_what_waits_on_the_host_is_not_the_devices(tmp_path):
    """Of a long row, cut into pieces, whose layers' inputs are offloaded."""
    folder = checkpoint(tmp_path / "small", SMALL)
    sections = {"model": {"name_or_path": folder}, "data": {"max_length": 32768}}
    training = {"per_device_train_batch_size": 1, "remat_policy": "offload"}
    run, config = run_of(SMALL, **sections, training=training)
    found = compile_elsewhere(run, config, "v5e:1x1")
    inputs = config.num_hidden_layers * 32768 * config.hidden_size * 2
    assert found.host_bytes_per_device == inputs
    memory = Estimator(config)(run, parse_topology("v5e:1x1"))
    assert memory.host == inputs
    assert 0.5 <= memory.total / found.bytes_per_device <= 2
    whole = compile_elsewhere(run.changed({"training.chunk_mlp": "none"}), config, "v5e:1x1")
    assert found.bytes_per_device < whole.bytes_per_device


@pytest.mark.slow
@needs_libtpu
def test_a_step_is_compiled_for_a_tpu_slice(tmp_path):
    folder = checkpoint(tmp_path / "small", SMALL)
    sections = {"model": {"name_or_path": folder}, "data": {"max_length": 512}, "parallel": {"fsdp": 4}}
    run, config = run_of(SMALL, **sections)
    found = compile_elsewhere(run, config, "v5e:2x2")
    assert found.fits
    memory = Estimator(config)(run, parse_topology("v5e:2x2"))
    assert 0.5 <= memory.total / found.bytes_per_device <= 2
    gathers = sum(n for what, n in found.collectives["forward"].items() if what.startswith("all-gather"))
    assert gathers == 4


@pytest.mark.slow
@needs_libtpu
def test_a_step_is_compiled_for_two_slices_between_which_gradients_of_adapters_alone_are_sent(tmp_path):
    folder = checkpoint(tmp_path / "small", SMALL)
    sections = {"model": {"name_or_path": folder}, "data": {"max_length": 512}}
    training = {"compiler_options": {"xla_tpu_of_tomorrow": True}}
    run, config = run_of(SMALL, **sections, training=training, parallel={"data": 2, "fsdp": 4})
    text = tmp_path / "step.hlo.gz"
    found = compile_here(run, config, "v5e:2x2:2", keep=text)
    assert found.fits
    assert found.notices == [
        "compiler option xla_tpu_of_tomorrow is left out: this version's compiler for tpu does not know it"
    ]
    # Devices 0 to 3 are of the first slice: what spans both is summed, and gathers stay within one.
    program = gzip.decompress(text.read_bytes()).decode()
    for line in program.splitlines():
        if " all-gather(" in line or " all-gather-start(" in line:
            assert not spans_slices(line, 4), line


def spans_slices(line: str, size: int) -> bool:
    """Whether a collective has devices of two slices in one of its groups."""
    listed = re.search(r"replica_groups=\{(\{[\d,{}]+\})\}", line)
    if listed:
        groups = [[int(one) for one in group.split(",")] for group in re.findall(r"\{([\d,]+)\}", listed[1])]
    else:
        iota = re.search(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", line)
        assert iota is not None, line
        shape = [int(one) for one in iota[3].split(",")]
        order = [int(one) for one in iota[4].split(",")] if iota[4] else range(len(shape))
        ids = np.arange(np.prod(shape)).reshape(shape).transpose(order)
        groups = ids.reshape(int(iota[1]), int(iota[2])).tolist()
    return any(len({one // size for one in group}) > 1 for group in groups)


@pytest.mark.slow
@needs_libtpu
def test_what_a_tpu_has_no_room_for_is_told_with_what_it_takes(tmp_path):
    raw = {**MINI, "num_hidden_layers": 2}
    run, config = run_of(
        raw,
        model={"name_or_path": checkpoint(tmp_path / "wide", raw)},
        data={"max_length": 4096},
        training={"per_device_train_batch_size": 64},
    )
    found = compile_elsewhere(run, config, "v5e:1x1")
    assert not found.fits
    topology = parse_topology("v5e:1x1")
    assert found.bytes_per_device > topology.hbm
    assert 0.8 <= Estimator(config)(run, topology).total / found.bytes_per_device <= 1.35


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("jax_cuda12_plugin") is None, reason="the plug-in is not installed")
@pytest.mark.parametrize("topology", ["gpu:h100:4", "gpu:a100:4", "gpu:l4:4"])
def test_a_step_is_compiled_for_cards_that_are_not_here(tmp_path, topology):
    folder = checkpoint(tmp_path / "small", SMALL)
    sections = {"model": {"name_or_path": folder}, "data": {"max_length": 512}, "parallel": {"fsdp": 4}}
    run, config = run_of(SMALL, **sections)
    found = compile_elsewhere(run, config, topology)
    assert found.fits
    assert 0.5 <= Estimator(config)(run, parse_topology(topology)).total / found.bytes_per_device <= 2
    gathers = sum(n for what, n in found.collectives["forward"].items() if what.startswith("all-gather"))
    assert gathers == 4
