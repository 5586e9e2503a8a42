"""A run's folder is held by one run."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from phi3_jax import InputError
from phi3_jax.system.lock import RunLock
from phi3_jax.training import loop
from phi3_jax.training.folder import RunFolder
from phi3_jax.training.loop import train
from tests.helpers.runs import run_config, write_inputs

SHORT = {"max_steps": 4, "eval_strategy": "no", "eval_steps": None, "logging_steps": 1}


ADAPTER = "adapter/adapter_model.safetensors"


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    return write_inputs(tmp_path_factory.mktemp("faults"))


def test_a_folder_in_use_is_refused_to_others(inputs, monkeypatch):
    run = run_config(inputs, "used", training={**SHORT, "resume_from_checkpoint": True})
    take, refused = loop.Trainer._take_step, []

    def take_and_start_another(self):
        take(self)
        for second in (run, run_config(inputs, "used", training={**SHORT, "overwrite_output_dir": True})):
            with monkeypatch.context() as patch:
                patch.setattr(loop, "load_job", pytest.fail)
                with pytest.raises(InputError, match=rf"used: another run is writing there \(process {os.getpid()} on"):
                    train(second)
            refused.append(1)

    monkeypatch.setattr(loop.Trainer, "_take_step", take_and_start_another)
    train(run)
    assert len(refused) == 8
    assert (inputs / "used" / ADAPTER).exists()
    assert not (inputs / "used" / "run.lock").exists()


@pytest.mark.slow
def test_a_run_that_comes_while_another_loads_is_refused(inputs, monkeypatch):
    """Both find an empty folder; the one that loads longer finds the other's run."""
    load = loop.load_job

    def load_slowly(run, **given):
        with monkeypatch.context() as patch:
            patch.setattr(loop, "load_job", load)
            train(run)
        return load(run, **given)

    monkeypatch.setattr(loop, "load_job", load_slowly)
    with pytest.raises(InputError, match="already holds a run"):
        train(run_config(inputs, "late", training={**SHORT, "max_steps": 1}))


HOLD = """
import sys, time
from pathlib import Path
from phi3_jax.system.lock import RunLock
RunLock.take(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(600)
"""


def test_a_killed_process_holds_nothing(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    with pytest.raises(InputError, match=rf"process {process.pid} on "):
        RunLock.take(tmp_path)
    process.kill()
    process.wait()
    assert (tmp_path / "run.lock").exists()
    lock = RunLock.take(tmp_path)
    assert json.loads((tmp_path / "run.lock").read_text())["pid"] == os.getpid()
    lock.release()
    assert not list(tmp_path.iterdir())


def test_a_file_system_without_locks_is_told(inputs, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", refuse)
    said = []
    folder = RunFolder(run_config(inputs, "unlocked", training={"save_strategy": "no"}), said.append)
    folder.open()
    folder.close()
    assert said == [f"warning: {inputs}/unlocked cannot be locked; see to it that no other run writes there"]
