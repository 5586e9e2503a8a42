"""What an earlier version wrote is read, resumed, evaluated and exported.

It lies in tests/from_before, whose README tells how it was made.
"""

import json
import shutil
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from phi3_jax.cli import main
from phi3_jax.hf.checkpoint import Checkpoint
from phi3_jax.peft.adapter import load_adapter
from phi3_jax.peft.save import save_adapter

BEFORE = Path(__file__).parent / "from_before"
RUNS = ["lora", "by_layer", "quantised"]
ADAPTER = "adapter_model.safetensors"
# Dropout's masks are drawn otherwise since: what such a run resumes from is the same, and its end another sample.
DROPS = {"lora"}
# The processor and the compiler decide how sums are rounded, so other ones give other bytes.
pytestmark = pytest.mark.optimized


@pytest.fixture
def before(tmp_path, monkeypatch) -> Path:
    """A copy to work in: the runs name their files from there."""
    shutil.copytree(BEFORE, tmp_path / "before")
    monkeypatch.chdir(tmp_path / "before")
    return tmp_path / "before"


def made_here() -> bool:
    """Whether this is the kind of processor, and the compiler, that the runs were made by."""
    cpu = Path("/proc/cpuinfo")
    if not cpu.exists():
        return False
    lines = (line.split(":") for line in cpu.read_text().splitlines())
    kind = [line[1].strip() for line in lines if line[0].strip() in ("vendor_id", "cpu family", "model")][:3]
    return json.loads((BEFORE / "made_by.json").read_text()) == {"jaxlib": version("jaxlib"), "cpu": kind}


def command(capsys, *argv: object) -> dict:
    """What a command says with --json."""
    capsys.readouterr()
    assert main(list(map(str, argv))) == 0
    out = capsys.readouterr().out
    return json.loads(out[out.index("{") :])


def eval_loss(name: str) -> float:
    """Of the rows to evaluate, with the adapter that a run ended with, as the version before told it."""
    return json.loads((BEFORE / "finished" / name / "eval_loss.json").read_text())


def distance(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> float:
    """Of all the numbers together, by the other's length."""
    assert {name: array.shape for name, array in one.items()} == {name: array.shape for name, array in other.items()}
    apart = sum(np.sum(np.square(one[name] - other[name])) for name in one)
    return float(np.sqrt(apart / sum(np.sum(np.square(array)) for array in other.values())))


@pytest.mark.parametrize("name", RUNS)
def test_a_run_is_resumed_to_the_end_that_the_version_before_gave_it(before, name, capsys):
    lines = (before / name / "metrics.jsonl").read_text().splitlines()[:2]
    argv = ["train", "--config", f"{name}/config.yaml", "--training.resume_from_checkpoint", "true"]
    assert main(argv) == 0
    assert "resuming at step 2 of 6" in capsys.readouterr().out
    metrics = (before / name / "metrics.jsonl").read_text().splitlines()
    assert metrics[:2] == lines
    losses = [row["eval_loss"] for row in map(json.loads, metrics) if "eval_loss" in row]
    assert losses[-1] == pytest.approx(eval_loss(name), rel=0.05 if name in DROPS else 1e-5)
    if name in DROPS:
        return
    ours, theirs = before / name / "adapter" / ADAPTER, BEFORE / "finished" / name / ADAPTER
    # Compiled without optimizations, for SSE4.2 alone, it ends 1e-7 from there.
    assert distance(load_file(ours), load_file(theirs)) < 1e-5
    if made_here():
        assert ours.read_bytes() == theirs.read_bytes()


@pytest.mark.parametrize("name", RUNS)
def test_an_adapter_is_read_evaluated_and_exported(before, name, capsys):
    adapter, expected = before / "finished" / name, eval_loss(name)
    (told,) = command(capsys, "info", adapter, "--json")["adapters"]
    raw = json.loads((adapter / "adapter_config.json").read_text())
    assert told["target_modules"] == raw["target_modules"]
    assert told["trainable_parameters"] == sum(array.size for array in load_file(adapter / ADAPTER).values())

    model = Checkpoint.open(before / "base").load_model(dtype="float32")
    lora = load_adapter(adapter, model)
    save_adapter("again", lora)
    again, whole = load_file("again/" + ADAPTER), load_file(adapter / ADAPTER)
    assert again.keys() == whole.keys()
    assert all(np.array_equal(again[key], whole[key]) for key in whole)

    def loss(*argv: object) -> float:
        rows = ["--dtype", "float32", "--data", "eval.jsonl", "--max-length", 32, "--json"]
        return command(capsys, "evaluate", *rows, *argv)["eval_loss"]

    base = ["--model", "base", *(["--quantization", "nf4"] if name == "quantised" else [])]
    assert loss(*base, "--adapter", adapter) == pytest.approx(expected, rel=1e-5)

    # The base that the adapter names is not here: --base says where it is now.
    export = ["export", adapter, "--base", "base", "--output"]
    assert main(list(map(str, [*export, "merged", "--merge"]))) == 0
    unquantised = loss("--model", "base", "--adapter", adapter) if name == "quantised" else expected
    assert loss("--model", "merged") == pytest.approx(unquantised, rel=1e-5)
    if name == "by_layer":
        assert main(list(map(str, [*export, "portable", "--portable"]))) == 2
        assert "use_dora" in capsys.readouterr().err
    else:
        assert main(list(map(str, [*export, "portable", "--portable"]))) == 0
        assert loss(*base, "--adapter", "portable") == pytest.approx(expected, rel=1e-5)
