"""The bench of compiled programs: its rows, and, slowly, the figures of docs/benchmarks.md."""

import importlib.util
import sys
from pathlib import Path

import pytest

from phi3_jax.parallel.hardware import GiB
from phi3_jax.performance.compile import compile_elsewhere
from phi3_jax.performance.step_time import step_time
from phi3_jax.performance.topology import abstract_mesh, parse_topology
from phi3_jax.training.abstract import abstract_step

SCRIPT = Path(__file__).parents[2] / "scripts" / "benchmarks" / "compiled.py"
# Peak GiB, XLA's estimate in ms, and what is waited for, by libtpu 0.0.42.1 and JAX 0.10.2.
FIGURES = {
    "mini-v5e": (10.39, 1689, {}),
    "mini-v6e-8": (3.86, 693, {"all-gather": 10, "all-reduce": 2}),
    "qlora-v5e": (4.12, 6817, {}),
}


@pytest.fixture(scope="module")
def compiled():
    spec = importlib.util.spec_from_file_location("compiled_bench", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_every_row_is_a_run_that_can_be_planned(compiled, testdata):
    for row in compiled.ROWS:
        run, config = row.run(testdata / "models")
        mesh = abstract_mesh(run, parse_topology(row.topology))
        assert mesh.size == parse_topology(row.topology).devices, row.name
        assert config.hidden_size in (3072, 5120)
        assert run.model.dtype == "bfloat16"


def test_a_row_that_is_none_is_refused(compiled, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["compiled.py", "mini-v7"])
    with pytest.raises(SystemExit) as ended:
        compiled.main()
    assert ended.value.code == 2
    assert "there is no row 'mini-v7'; give some of mini-v5e" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
@pytest.mark.parametrize("name", FIGURES)
def test_the_main_figures_hold(compiled, testdata, name):
    row = next(row for row in compiled.ROWS if row.name == name)
    run, config = row.run(testdata / "models")
    found = compile_elsewhere(run, config, row.topology)
    peak, milliseconds, waited = FIGURES[name]
    assert found.bytes_per_device / GiB == pytest.approx(peak, rel=0.05)
    assert found.cost.seconds * 1e3 == pytest.approx(milliseconds, rel=0.05)
    assert found.cost.waited_for == waited
    assert "collective-permute" not in found.cost.sent
    topology = parse_topology(row.topology)
    mesh = abstract_mesh(run, topology)
    trainable = abstract_step(run, config, mesh).table.trainable
    by_program, reckoned = (
        step_time(run, config, dict(mesh.shape), trainable, topology, cost).seconds[0] for cost in (found.cost, None)
    )
    assert reckoned == pytest.approx(by_program, rel=0.25)
