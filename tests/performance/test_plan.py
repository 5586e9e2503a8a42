"""`phi3-jax plan`: its figures against hand arithmetic, its refusals, and what it proposes."""

import json

import pytest

from phi3_jax.cli import main
from phi3_jax.config.model import Phi3Config
from phi3_jax.parallel.mesh import AXES
from phi3_jax.performance.memory import attention_of, state_bytes
from phi3_jax.performance.plan import make_plan
from phi3_jax.performance.step_time import UTILISATION, step_time
from phi3_jax.performance.topology import abstract_mesh, parse_topology
from phi3_jax.training.abstract import abstract_step
from tests.helpers.plans import MINI, SMALL, checkpoint, run_of

GB, GiB = 10**9, 2**30


@pytest.fixture
def mini(tmp_path):
    return checkpoint(tmp_path / "mini", MINI)


@pytest.fixture
def small(tmp_path):
    return checkpoint(tmp_path / "small", SMALL)


def plan(capsys, folder, *arguments):
    """What `plan --json` prints, and its exit status."""
    status = main(["plan", "--model.name_or_path", folder, "--json", *arguments])
    captured = capsys.readouterr()
    return status, json.loads(captured.out) if status == 0 else captured.err


def test_the_figures_of_phi_3_mini(capsys, mini):
    batch = ("--training.per_device_train_batch_size", "1")
    status, found = plan(capsys, mini, "--topology", "gpu:h200", "--data.max_length", "2048", *batch)
    assert status == 0
    assert found["parameters"] == 3_821_079_552
    assert found["trainable_parameters"] == 25_165_824
    # 4 N + 6 N_lora + 12 · layers · width · the mean number of keys, the window's end included.
    keys = sum(min(i + 1, 2047) for i in range(2048)) / 2048
    flops = 4 * 3_722_379_264 + 6 * 25_165_824 + 12 * 32 * 3072 * keys
    assert found["flops_per_token"] == pytest.approx(flops)
    assert flops == pytest.approx(16.25e9, rel=1e-3)
    # Rematerialisation repeats the layers' forward pass: 2 FLOP a weight, and 4 a pair of positions.
    again = 2 * (3_722_379_264 - 32064 * 3072 + 25_165_824) + 4 * 32 * 3072 * keys
    assert found["computed_flops_per_token"] == pytest.approx(flops + again)
    assert found["tokens_per_step"] == 2048
    # bfloat16 weights; an adapter, and two moments, in float32; each layer's input in bfloat16.
    kinds = found["bytes_per_device"]
    assert kinds["weights"] == 2 * 3_821_079_552
    assert kinds["adapter"] == 4 * 25_165_824
    assert kinds["optimizer"] == pytest.approx(8 * 25_165_824, abs=100)
    assert kinds["activations"] == 32 * 2048 * 3072 * 2
    assert found["hbm_bytes_per_device"] == sum(kinds.values())
    assert found["hbm_limit_bytes"] == 141 * GB
    assert found["fits"] is True
    assert found["basis"] == "estimated"


def test_keys_outside_of_the_window_cost_nothing():
    topology, mesh = parse_topology("gpu:h100"), dict.fromkeys(AXES, 1)
    for window, keys in ((2047, 2047 - 2047 * 2046 / 2 / 4096), (None, 4097 / 2)):
        run, config = run_of({**MINI, "sliding_window": window}, data={"max_length": 4096})
        flops = step_time(run, config, mesh, 25_165_824, topology).flops_per_token
        assert flops == pytest.approx(4 * 3_722_379_264 + 6 * 25_165_824 + 12 * 32 * 3072 * keys)


def held(topology, **sections):
    """Bytes of weights, adapter and optimizer on a device, of Phi-3-mini; nothing is traced."""
    run, config = run_of(MINI, **sections)
    return state_bytes(abstract_step(run, config, abstract_mesh(run, parse_topology(topology))))


@pytest.mark.parametrize("peft", [{"use_dora": True}, {"modules_to_save": ["lm_head"]}, {"init_lora_weights": "eva"}])
def test_adapters_of_other_kinds_have_their_own_size(peft):
    extra = {"use_dora": 32 * (9216 + 3072 + 16384 + 3072), "modules_to_save": 32064 * 3072}.get(next(iter(peft)), 0)
    assert held("gpu:h200", peft=peft)["adapter"] == 4 * (25_165_824 + extra)


def test_a_plan_for_this_machine_is_compiled_and_near_the_estimate(capsys, small):
    arguments = ("--topology", "cpu", "--model.dtype", "float32", "--data.max_length", "256")
    status, found = plan(capsys, small, *arguments)
    assert status == 0
    assert found["basis"] == "compiled"
    assert found["fits"] is True
    assert found["hbm_bytes_per_device"] == sum(found["bytes_per_device"].values())
    least, most = found["step_seconds"]
    assert 0 < least < most
    _, estimated = plan(capsys, small, *arguments, "--estimate")
    assert estimated["basis"] == "estimated"
    assert 0.7 <= estimated["hbm_bytes_per_device"] / found["hbm_bytes_per_device"] <= 1.3


def test_without_libtpu_it_says_so_and_estimates(capsys, monkeypatch, mini):
    monkeypatch.setattr("phi3_jax.performance.compile.has_libtpu", lambda: False)
    status, found = plan(capsys, mini, "--topology", "v5e:2x2", "--parallel.fsdp", "4")
    assert status == 0
    assert found["basis"] == "estimated"
    assert found["hbm_limit_bytes"] == 15.75 * GiB
    assert "pip install 'phi3_jax[tpu]'" in found["notes"][0]


def test_without_the_plug_in_a_plan_for_a_gpu_says_so(monkeypatch, small):
    monkeypatch.setattr("phi3_jax.performance.compile.has_cuda_plugin", lambda: False)
    run, _ = run_of(SMALL, model={"name_or_path": small}, data={"max_length": 128})
    assert "pip install 'phi3_jax[plan-gpu]'" in make_plan(run, "gpu:l4").notes[0]
    assert "more of a GPU of 24 GB than is known" in make_plan(run, "gpu:24GB").notes[0]
    assert make_plan(run, "gpu:l4", estimate=True).notes == []


def test_a_plug_in_of_another_version_is_refused_by_name(capsys, monkeypatch, small):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name == "jax_cuda12_plugin" or None)
    versions = ("0.9.1", "0.10.2")
    monkeypatch.setattr(
        "phi3_jax.performance.compile.package_versions", lambda *names: dict(zip(names, versions, strict=True))
    )
    status, line = plan(capsys, small, "--topology", "gpu:h100", "--data.max_length", "128")
    assert status == 2
    assert "jax-cuda12-plugin is 0.9.1, expected 0.10.2 as jaxlib is" in line
    assert line.count("\n") == 1


def test_what_does_not_fit_is_an_answer_with_ways_out(capsys, mini):
    arguments = ("--data.max_length", "4096", "--training.remat_policy", "none")
    status, found = plan(capsys, mini, "--topology", "gpu:l4", *arguments)
    assert status == 0
    assert found["fits"] is False
    assert found["hbm_bytes_per_device"] > found["hbm_limit_bytes"]
    assert found["alternatives"]
    for alternative in found["alternatives"]:
        options = [text for name, value in alternative["changes"].items() for text in (f"--{name}", str(value).lower())]
        status, other = plan(capsys, mini, "--topology", "gpu:l4", *arguments, *options)
        assert status == 0
        assert other["fits"] is True, options
        assert other["hbm_bytes_per_device"] == alternative["bytes_per_device"]


@pytest.mark.parametrize(("rows", "is_close"), [(1, False), (7, True)])
def test_an_estimate_near_the_limit_says_so(mini, rows, is_close):
    run, _ = run_of(
        MINI,
        model={"name_or_path": mini},
        data={"max_length": 4096},
        training={"per_device_train_batch_size": rows},
    )
    found = make_plan(run, "gpu:l4")
    assert found.fits
    assert any("too close" in note for note in found.notes) == is_close


def test_a_compiler_that_fails_leaves_an_estimate_and_a_word(monkeypatch, small):
    def fails(*_):
        raise RuntimeError("the compiler ended with status -9: killed")

    monkeypatch.setattr("phi3_jax.performance.plan.compile_elsewhere", fails)
    run, _ = run_of(SMALL, model={"name_or_path": small}, data={"max_length": 128})
    found = make_plan(run, "cpu")
    assert found.compiled is None
    assert "status -9" in found.notes[0]


def test_a_gpu_of_which_only_the_memory_is_known_has_no_time(small):
    run, _ = run_of(SMALL, model={"name_or_path": small}, data={"max_length": 128})
    found = make_plan(run, "gpu:24GB")
    assert (found.fits, found.topology.hbm, found.time.seconds) == (True, 24 * GB, None)
    assert "GPU of 24 GB" in found.time.basis


@pytest.mark.parametrize(("dtype", "peak"), [("bfloat16", 8.1e12), ("float16", 65e12)])
def test_a_gpu_without_bfloat16_multiplies_it_in_float32(small, dtype, peak):
    model = {"name_or_path": small, "dtype": dtype}
    found = make_plan(run_of(SMALL, model=model, data={"max_length": 128})[0], "gpu:t4")
    assert found.time.seconds[0] == pytest.approx(
        found.time.tokens * found.time.computed_per_token / (UTILISATION[1] * peak)
    )
    assert any("float16 is faster" in note for note in found.notes) == (dtype == "bfloat16")
    mesh = abstract_mesh(found.run, found.topology)
    # cuDNN's attention is for Ampere and later.
    assert attention_of(found.run, Phi3Config.from_dict(SMALL), mesh) == "chunked"
    assert (
        attention_of(found.run, Phi3Config.from_dict(SMALL), abstract_mesh(found.run, parse_topology("gpu:l4")))
        == "cudnn"
    )
