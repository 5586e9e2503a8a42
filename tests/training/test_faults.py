"""Runs that are stopped, resumed with other settings, written to by two, or left without a disk."""

import errno
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from phi3_jax import InputError
from phi3_jax.config.run import RunConfig
from phi3_jax.system.files import StorageError, temporary_folder, write_text
from phi3_jax.system.lock import RunLock
from phi3_jax.training import evaluation, loop, results
from phi3_jax.training.checks import check_output_folder, check_unchanged, remove_leftovers
from phi3_jax.training.folder import Checkpoints, RunFolder
from phi3_jax.training.loop import train
from tests.helpers.runs import SETTINGS, cut_off, metrics, run_config, same_run, write_inputs

# As test_resume's, in rows of one length: one program.
LIKE = {"data": {"packing": True}, "training": {**SETTINGS, "eval_generations": 1}}
SHORT = {"max_steps": 4, "eval_strategy": "no", "eval_steps": None, "logging_steps": 1}
ADAPTER = "adapter/adapter_model.safetensors"


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    return write_inputs(tmp_path_factory.mktemp("faults"))


@pytest.fixture(scope="module")
def whole(inputs) -> Path:
    """A run that nothing disturbed."""
    train(run_config(inputs, "whole", **LIKE))
    return inputs / "whole"


def like_whole(inputs: Path, output: str, **training: object) -> RunConfig:
    return run_config(inputs, output, **{**LIKE, "training": {**LIKE["training"], **training}})


def saved(output: Path) -> list[int]:
    return sorted(int(path.name) for path in (output / "checkpoints").iterdir())


def signal_at(monkeypatch, step: int, number: int) -> None:
    """Sends this process a signal while it takes that step."""
    take = loop.Trainer._take_step

    def take_and_signal(self):
        take(self)
        if self.progress.step == step:
            signal.raise_signal(number)

    monkeypatch.setattr(loop.Trainer, "_take_step", take_and_signal)


# SIGTERM and SIGINT.


@pytest.mark.parametrize(("number", "raised"), [(signal.SIGTERM, SystemExit), (signal.SIGINT, KeyboardInterrupt)])
def test_a_signal_saves_the_step_and_leaves(inputs, whole, monkeypatch, capsys, number, raised):
    before = signal.getsignal(number)
    run = like_whole(inputs, f"signal{number}", resume_from_checkpoint=True)
    with monkeypatch.context() as patch:
        signal_at(patch, 3, number)
        with pytest.raises(raised) as left:
            train(run)
    if number == signal.SIGTERM:
        assert left.value.code == 143
    output = inputs / f"signal{number}"
    assert saved(output) == [2, 3]
    assert not (output / "adapter").exists()
    assert "stopped: saved the checkpoint of step 3; go on with" in capsys.readouterr().out
    assert signal.getsignal(number) is before
    train(run)
    assert "resuming at step 3 of 7" in capsys.readouterr().out
    same_run(whole, output)


@pytest.mark.parametrize("which", [1, 2])
def test_a_signal_stops_an_evaluation(inputs, whole, monkeypatch, which):
    """It is not waited for, and done again when the run is resumed: that of step 4, or that of the last step."""
    run = like_whole(inputs, f"evaluation{which}", resume_from_checkpoint=True)
    evaluate, calls = evaluation.evaluate_rows, []

    def evaluate_and_signal(*arguments):
        calls.append(1)
        if len(calls) == which + 1:  # the first one is that before training
            signal.raise_signal(signal.SIGTERM)
        return evaluate(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(evaluation, "evaluate_rows", evaluate_and_signal)
        with pytest.raises(SystemExit):
            train(run)
    output, step = inputs / f"evaluation{which}", [4, 7][which - 1]
    assert saved(output)[-1] == step
    assert step not in [row["step"] for row in metrics(output) if "eval_loss" in row]
    train(run)
    same_run(whole, output)


@pytest.mark.slow
def test_a_signal_before_the_first_step_leaves_nothing_to_resume(inputs, monkeypatch, capsys):
    run = run_config(inputs, "early", training={"max_steps": 1, "resume_from_checkpoint": True})
    evaluate = evaluation.evaluate_rows
    monkeypatch.setattr(evaluation, "evaluate_rows", lambda *x: [signal.raise_signal(15), evaluate(*x)][1])
    with pytest.raises(SystemExit):
        train(run)
    assert "stopped: nothing to save before the first step" in capsys.readouterr().out
    assert saved(inputs / "early") == []


@pytest.mark.slow
def test_a_signal_saves_where_no_checkpoints_were_wanted(inputs, monkeypatch):
    settings = {**SHORT, "save_strategy": "no", "resume_from_checkpoint": True}
    run = run_config(inputs, "unsaved", training=settings)
    with monkeypatch.context() as patch:
        signal_at(patch, 2, signal.SIGTERM)
        with pytest.raises(SystemExit):
            train(run)
    assert saved(inputs / "unsaved") == [2]
    train(run)
    assert [row["step"] for row in metrics(inputs / "unsaved")] == [1, 2, 3, 4]


# Resuming with other settings.


def test_other_settings_are_named_and_allowed_on_request(inputs, monkeypatch, capsys):
    cut_off(run_config(inputs, "changed", training=SHORT), 3, monkeypatch)
    settings = {**SHORT, "resume_from_checkpoint": True, "learning_rate": 0.5, "save_steps": 3}
    with pytest.raises(InputError, match=r"training\.learning_rate \(0.01 then, 0.5 now\);.*resume_changed true") as no:
        train(run_config(inputs, "changed", training=settings))
    assert "save_steps" not in str(no.value)
    capsys.readouterr()
    train(run_config(inputs, "changed", training={**settings, "resume_changed": True}))
    lines = capsys.readouterr().out.splitlines()
    (warning,) = (line for line in lines if line.startswith("warning: resuming with other settings"))
    assert warning.endswith("training.learning_rate (0.01 then, 0.5 now)")
    (other,) = (line for line in lines if "which do not change the result" in line)
    assert other.endswith(": training.save_steps (2 then, 3 now)")
    assert (
        [row["learning_rate"] for row in metrics(inputs / "changed")][1]
        < 0.02
        < metrics(inputs / "changed")[2]["learning_rate"]
    )
    check_output_folder(run_config(inputs, "changed", training=settings))  # it has these settings now


def test_a_setting_that_is_newer_than_the_run_had_its_default(inputs, tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text(re.sub(r"  max_grad_norm: .*\n", "", run_config(inputs).to_yaml()))
    assert "max_grad_norm" not in config.read_text()
    check_unchanged(run_config(inputs), config)
    with pytest.raises(InputError, match=r"training.max_grad_norm \(1.0 then, 2.0 now\)"):
        check_unchanged(run_config(inputs, training={"max_grad_norm": 2.0}), config)


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

    def load_slowly(run):
        with monkeypatch.context() as patch:
            patch.setattr(loop, "load_job", load)
            train(run)
        return load(run)

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


def refusing(number: int):
    def refuse(*arguments, **_):
        raise OSError(number, os.strerror(number), str(arguments[0]))

    return refuse


@pytest.mark.parametrize("number", [errno.ENOSPC, pytest.param(errno.EACCES, marks=pytest.mark.slow)])
def test_weights_that_cannot_be_written_go_elsewhere(inputs, monkeypatch, number):
    save, calls = results.save_adapter, []

    def save_in_vain(folder, *arguments, **options):
        calls.append(folder)
        if len(calls) == 1:
            with monkeypatch.context() as patch:
                patch.setattr("phi3_jax.peft.save.write_safetensors", refusing(number))
                save(folder, *arguments, **options)
        save(folder, *arguments, **options)

    monkeypatch.setattr(results, "save_adapter", save_in_vain)
    fallback = inputs / f"fallback{number}"
    run = run_config(inputs, f"refused{number}", training={**SHORT, "fallback_dir": str(fallback)})
    with pytest.raises(StorageError, match=os.strerror(number)) as refused:
        train(run)
    message = str(refused.value)
    assert message.startswith(f"{inputs}/refused{number}/adapter: cannot be written")
    if number == errno.ENOSPC:
        size = (fallback / f"refused{number}-step4" / ADAPTER).stat().st_size
        needed = int(re.search(r"([\d,]+) bytes are needed", message)[1].replace(",", ""))
        assert 0.5 * size < needed <= size
    assert "the weights of step 4 are in" in message
    assert not (inputs / f"refused{number}" / "adapter").exists()


def test_without_a_fallback_or_with_a_full_one_it_is_said(inputs, monkeypatch):
    monkeypatch.setattr("phi3_jax.peft.save.write_safetensors", refusing(errno.ENOSPC))
    with pytest.raises(StorageError, match=r"step 4 is whole; training\.fallback_dir would name a folder for the wei"):
        train(run_config(inputs, "nowhere", training=SHORT))
    settings = {**SHORT, "fallback_dir": str(inputs / "full"), "resume_from_checkpoint": True}
    with pytest.raises(
        StorageError, match=r"nor can the weights of step 4 be saved in .*full/nowhere-step4/adapter: c"
    ):
        train(run_config(inputs, "nowhere", training=settings))
    (inputs / "file").write_text("")
    with pytest.raises(InputError, match=r"training\.fallback_dir .*file.*expected a folder"):
        train(run_config(inputs, "other", training={**SHORT, "fallback_dir": str(inputs / "file")}))


@pytest.mark.slow
def test_a_report_that_cannot_be_written_leaves_the_weights_where_they_are(inputs, monkeypatch):
    monkeypatch.setattr(results, "write_report", refusing(errno.ENOSPC))
    run = run_config(inputs, "unreported", training={**SHORT, "max_steps": 1, "fallback_dir": str(inputs / "unused")})
    with pytest.raises(StorageError, match=r"the weights of step 1 are in .*unreported/adapter$"):
        train(run)
    assert (inputs / "unreported" / ADAPTER).exists()
    assert not (inputs / "unused").exists()


@pytest.mark.slow
def test_full_finetuning_falls_back_too(inputs, monkeypatch):
    monkeypatch.setattr(Checkpoints, "save", lambda *_: (_ for _ in ()).throw(StorageError("full")))
    settings = {**SHORT, "max_steps": 1, "fallback_dir": str(inputs / "models")}
    with pytest.raises(StorageError, match=r"full; there is no checkpoint; the weights of step 1 are in .*/model$"):
        train(run_config(inputs, "full", peft={"full_finetuning": True}, training=settings))
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {
        path.name for path in (inputs / "models" / "full-step1" / "model").iterdir()
    }


# Files and folders that are whole or not there.


def test_a_file_that_cannot_be_written_stays_as_it_was(tmp_path, monkeypatch):
    path = tmp_path / "file.json"
    write_text(path, "old")
    monkeypatch.setattr(os, "replace", refusing(errno.ENOSPC))
    with pytest.raises(StorageError, match=r"file\.json: cannot be written .* 3 bytes are needed"):
        write_text(path, "new")
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == {"file.json": "old"}


def test_temporary_folders_of_the_dead_are_removed_and_those_of_the_living_stay(tmp_path):
    dead, other, mine = tmp_path / f".out.{'0' * 32}", tmp_path / f".out2.{'0' * 32}", tmp_path / ".out.notes"
    for folder in (dead, other, mine):
        (folder / "part").mkdir(parents=True)
    with temporary_folder(tmp_path, ".out.") as first, temporary_folder(tmp_path, ".out.") as second:
        assert {path.name for path in tmp_path.iterdir()} == {path.name for path in (first, second, other, mine)}
        (second / "part").mkdir()
    assert sorted(tmp_path.iterdir()) == sorted([other, mine])


def test_leftovers_of_a_killed_run_are_removed(tmp_path):
    for folder in (f".adapter.{'0' * 32}", f"model/.saving-{'0' * 32}", "checkpoints.removing/3", "adapter"):
        (tmp_path / folder).mkdir(parents=True)
    for name in ("metrics.jsonl.tmp", "config.yaml.tmp", "report.html.tmp", "metrics.jsonl", "notes.tmp"):
        (tmp_path / name).write_text("{")
    remove_leftovers(tmp_path)
    left = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")}
    assert left == {"adapter", "model", "metrics.jsonl", "notes.tmp"}
