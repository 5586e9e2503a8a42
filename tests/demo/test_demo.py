"""The demo as a user runs it."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from phi3_jax.demo import demo_path
from phi3_jax.demo.run import demo_config


def test_the_run_names_files_that_exist_wherever_it_is_started(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = demo_config("somewhere", seed=3)
    assert Path(run.model.name_or_path).is_dir()
    assert Path(run.data.train).is_file()
    assert Path(run.data.eval).is_file()
    assert run.training.output_dir == "somewhere"
    assert run.training.seed == 3


def test_other_files_are_refused():
    with pytest.raises(ValueError, match="is no file of the demo"):
        demo_path("../config.py")


@pytest.mark.slow
def test_the_demo_teaches_the_house_format(tmp_path):
    code = "from phi3_jax.cli import main; raise SystemExit(main())"
    command = [sys.executable, "-c", code, "demo", "--output_dir", "out"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    losses = [row["eval_loss"] for row in rows if "eval_loss" in row]
    assert losses[-1] < 0.2 * losses[0]
    results = json.loads((tmp_path / "out" / "all_results.json").read_text())
    assert results["exact_match"] > 0.8
    before, after = re.search(r"exact match: ([\d.]+)% before, ([\d.]+)% after", done.stdout).groups()
    assert float(before) < 10
    assert float(after) > 80
    assert (tmp_path / "out" / "report.html").is_file()
    assert (tmp_path / "out" / "adapter" / "adapter_model.safetensors").is_file()
