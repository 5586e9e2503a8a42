"""SIGKILL at chosen points, and at random ones, by scripts/kill_test.py."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.runs import same_run

ROOT = Path(__file__).parents[2]


def call(*arguments: str) -> str:
    result = subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=1200)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.mark.parametrize(
    "names",
    [["four"], pytest.param(["sealed", "removal", "line", "adapter"], marks=pytest.mark.slow)],
)
def test_runs_killed_at_chosen_points_end_as_if_nothing_had_been(tmp_path, names):
    """Where, see tests/training/killed.py."""
    said = call("-m", "tests.helpers.killed_runs", str(tmp_path), *names)
    whole = tmp_path / "whole"
    for name in names:
        same_run(whole, tmp_path / name)
        for folder in (".", "checkpoints"):
            left, expected = ({path.name for path in (run / folder).iterdir()} for run in (tmp_path / name, whole))
            assert left == expected, (name, folder)
    assert len(re.findall(r"resuming at step [2467] of 7", said)) >= len(names)
    assert "warning" not in said


@pytest.mark.slow
def test_runs_killed_at_random_instants_end_as_if_nothing_had_been():
    said = call("scripts/kill_test.py", "--kills", "20", "--seed", "1")
    assert "all 20 resumed to byte-identical adapters, with every step once in metrics.jsonl" in said
