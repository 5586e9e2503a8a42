"""What a run holds on to while it goes on: nothing that grows with its steps."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from phi3_jax.training import loop
from tests.helpers.runs import run_config, write_inputs

SCRIPT = Path(__file__).parents[2] / "scripts" / "long_run.py"

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads what Linux says of a process")


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("long_run", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_steps_evaluations_and_checkpoints_leave_nothing_behind(tmp_path, script):
    """Arrays, files and programs after 8 steps and after 16, with as many of all of them in between."""
    settings = {"max_steps": 16, "eval_steps": 2, "save_steps": 2, "save_total_limit": 1, "logging_steps": 2}
    run = run_config(write_inputs(tmp_path), training=settings)
    counter = script.Compilations()
    trainer = loop.Trainer(run, loop.load_job(run))
    found = []
    after_step = trainer._after_step

    def measured():
        after_step()
        trainer.files.checkpoints.wait()
        jax.block_until_ready(trainer.state)
        found.append(script.measure(counter.count))

    trainer._after_step = measured
    trainer.run_all()
    trainer.close()
    for name in ("arrays", "files", "compilations"):
        assert found[7][name] == found[15][name] > 0, name


def test_what_grew_is_named(script):
    flat = {"resident": 10**9, "arrays": 5, "files": 9, "threads": 30, "compilations": 40}
    rows = [{**flat, "step": step} for step in (10, 20, 30, 40, 50)]
    rows[0]["compilations"] = 1  # of the warm-up
    assert script.verdict(rows, 20) == []
    for name, slack in script.SLACK.items():
        grown = [*rows[:-1], {**rows[-1], name: flat[name] + slack + 1}]
        assert script.verdict(grown, 20) == [f"{name} grew by {slack + 1:,} from step 20 to step 50"]


@pytest.mark.slow
def test_three_hundred_steps_are_flat():
    command = [sys.executable, str(SCRIPT), "--steps", "300", "--every", "50", "--events", "10"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(re.findall(r"^step +\d+  resident", done.stdout, re.MULTILINE)) == 6
    assert done.stdout.splitlines()[-1] == "flat: nothing grew after the warm-up"
