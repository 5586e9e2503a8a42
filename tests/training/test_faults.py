"""Runs that are stopped, resumed with other settings, written to by two, or left without a disk."""

import errno
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from phi3_jax.system.files import StorageError
from phi3_jax.training import loop, results
from phi3_jax.training.folder import RunFolder
from phi3_jax.training.loop import train
from tests.helpers.disks import refusing
from tests.helpers.runs import metrics, run_config, write_inputs

SHORT = {"max_steps": 4, "eval_strategy": "no", "eval_steps": None, "logging_steps": 1}
ADAPTER = "adapter/adapter_model.safetensors"


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    return write_inputs(tmp_path_factory.mktemp("faults"))


# SIGTERM and SIGINT.


# Resuming with other settings.


# metrics.jsonl.


def test_lines_that_the_checkpoint_counts_and_are_lost(inputs):
    said = []
    folder = RunFolder(run_config(inputs, "lost"), said.append)
    folder.path.mkdir()
    path = folder.path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n{"step": 2}\n{"step": 3, "lo')
    assert folder.open_metrics(2) == 2
    folder.close()
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'
    path.write_bytes(b'{"step": 1}\n{"st')
    assert not said
    assert folder.open_metrics(3) == 1
    folder.log.write({"step": 4})
    folder.close()
    assert said == [f"warning: {path} has only 1 of the 3 lines up to the checkpoint; the others are lost"]
    assert path.read_text() == '{"step": 1}\n{"step": 4}\n'


# Two runs on one folder.


# Disks that take no more.


def fill(path: Path) -> None:
    with path.open("wb", buffering=0) as file:
        while True:
            file.write(b"x" * 1000)


def test_a_full_disk_and_a_fallback(inputs, small_disk, tmp_path, monkeypatch):
    output, fallback = small_disk / "out", tmp_path / "fallback"
    filler = small_disk / "filler"
    take = loop.Trainer._take_step

    def take_and_fill(self):
        take(self)
        if self.progress.step == 3:
            self.files.checkpoints.wait()
            with pytest.raises(OSError, match="No space"):
                fill(filler)

    settings = {**SHORT, "logging_steps": 4, "save_steps": 2, "fallback_dir": str(fallback), "output_dir": str(output)}
    settings["resume_from_checkpoint"] = True
    with monkeypatch.context() as patch:
        patch.setattr(loop.Trainer, "_take_step", take_and_fill)
        with pytest.raises(StorageError, match="No space left on device") as refused:
            train(run_config(inputs, "out", logging={"tensorboard": True}, training=settings))
    message = str(refused.value)
    assert message.startswith(f"{output}/metrics.jsonl: cannot be written")
    assert "bytes are needed, 0 bytes are free there; free some" in message
    target = fallback / "out-step4" / "adapter"
    assert message.endswith(f"the checkpoint of step 2 is whole; the weights of step 4 are in {target}")
    filler.unlink()
    train(run_config(inputs, "out", training=settings))
    rescued, expected = load_file(fallback / "out-step4" / ADAPTER), load_file(output / ADAPTER)
    for name in expected:
        np.testing.assert_array_equal(rescued[name], expected[name])
    assert [row["step"] for row in metrics(output)] == [4]


@pytest.mark.slow
def test_a_report_that_cannot_be_written_leaves_the_weights_where_they_are(inputs, monkeypatch):
    monkeypatch.setattr(results, "write_report", refusing(errno.ENOSPC))
    run = run_config(inputs, "unreported", training={**SHORT, "max_steps": 1, "fallback_dir": str(inputs / "unused")})
    with pytest.raises(StorageError, match=r"the weights of step 1 are in .*unreported/adapter$"):
        train(run)
    assert (inputs / "unreported" / ADAPTER).exists()
    assert not (inputs / "unused").exists()


# Files and folders that are whole or not there.
