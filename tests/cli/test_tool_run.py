"""The recipe for rows with tools, from the file to the metric: what a tiny random model learns of calling them."""

import json
from pathlib import Path

import pytest

from phi3_jax.cli import main
from tests.helpers.tool_rows import write_phi4_mini, write_tool_rows

pytestmark = pytest.mark.slow
RECIPE = Path(__file__).parents[2] / "configs" / "phi4_mini_tools.yaml"


def test_calls_are_learnt_from_rows_as_openai_has_them(tmp_path, capsys):
    rows, held_out = write_tool_rows(tmp_path)
    base = str(write_phi4_mini(tmp_path / "base"))
    # The recipe, for a model that knows nothing yet: larger steps, more of them, and short rows.
    options = {
        "model.name_or_path": base,
        "model.dtype": "float32",
        "peft.r": 48,
        "peft.lora_alpha": 96,
        "peft.lora_dropout": 0,
        "data.train": rows,
        "data.eval": held_out,
        "data.eval_fraction": 0,
        "data.max_length": 384,
        "data.packing": "false",
        "training.output_dir": tmp_path / "out",
        "training.learning_rate": 4e-3,
        "training.max_steps": 400,
        "training.per_device_train_batch_size": 8,
        "training.gradient_accumulation_steps": 1,
        "training.gradient_checkpointing": "false",
        "training.save_strategy": "no",
        "training.eval_generations": 0,
        "logging.tensorboard": "false",
    }
    arguments = [part for name, value in options.items() for part in (f"--{name}", str(value))]
    assert main(["train", "--config", str(RECIPE), *arguments]) == 0
    said = capsys.readouterr().out
    assert "tool_calls are written as <|tool_call|>[...]<|/tool_call|>" in said
    assert "tools are handed over in the system turn" in said
    evaluate = ["evaluate", "--model", base, "--dtype", "float32", "--adapter", str(tmp_path / "out" / "adapter")]
    evaluate += ["--data", str(held_out), "--turns", "all", "--metrics", "tool_call,loss", "--max-new-tokens", "64"]
    assert main([*evaluate, "--output", str(tmp_path / "eval")]) == 0
    results = json.loads((tmp_path / "eval" / "results.json").read_text())["models"]
    before, after = results["base"], results["out"]
    for metric in ("tool_call", "tool_call_name"):
        assert before[metric]["value"] == 0.0
        assert after[metric]["value"] >= 0.8, after
    assert after["tool_call_row"]["value"] > before["tool_call_row"]["value"] + 0.5
    assert after["loss"]["value"] < 0.1 < before["loss"]["value"]
