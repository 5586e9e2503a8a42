"""Skipped steps are named, with their rows."""

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from phi3_jax.training.loop import train
from tests.helpers.nonfinite import poison
from tests.helpers.runs import metrics, run_config, write_inputs


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    """Rows of which the fourth has a letter whose embedding is not finite."""
    return poison(write_inputs(tmp_path_factory.mktemp("nonfinite")))


def settings(**training):
    return {"training": {"eval_strategy": "no", "eval_steps": None, "save_strategy": "no", **training}}


def adapter_of(folder: Path) -> dict[str, np.ndarray]:
    return load_file(folder / "adapter" / "adapter_model.safetensors")


def test_a_poisoned_row_is_skipped_and_named(inputs, capsys):
    run = run_config(inputs, "row", data={"packing": True, "eval": None}, **settings(logging_steps=1))
    train(run)
    warnings = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning: ")]
    out = Path(run.training.output_dir)
    rows = metrics(out)
    skipped = [row["step"] for row in rows if "loss" not in row]
    assert 1 <= len(skipped) <= 4
    assert rows[-1]["skipped"] == len(skipped) == len(warnings)
    for step, warning in zip(skipped, warnings, strict=True):
        assert warning.startswith(f"warning: step {step} was skipped, its loss or gradient is not finite; ")
        assert f"the loss of {inputs / 'chats.jsonl'}, row 4 (" in warning
        assert warning.endswith(") is not")
        assert warning.count(", row ") == 1
    assert all(np.isfinite(tensor).all() for tensor in adapter_of(out).values())
