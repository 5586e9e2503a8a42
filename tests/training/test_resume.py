"""A run that was cut off and resumed is the run that was not, bit for bit."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
import yaml

from phi3_jax import InputError
from phi3_jax.config.training import TrainingSection
from phi3_jax.training.checkpoint_names import steps_of
from phi3_jax.training.checkpoints import Checkpoints
from phi3_jax.training.loop import train
from phi3_jax.training.resume import ResumePoint
from tests.helpers.models import random_lora, tiny_model
from tests.helpers.rows import accumulated, random_rows
from tests.helpers.runs import SETTINGS, cut_off, metrics, run_config, same_run, start, write_inputs


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    return write_inputs(tmp_path_factory.mktemp("resume"))


LIKE = {"data": {"packing": False}, "training": SETTINGS}


def test_resuming_continues_bit_for_bit(inputs, monkeypatch, capsys):
    whole = run_config(inputs, "whole", **LIKE)
    train(whole)
    cut_off(run_config(inputs, "cut", **LIKE), 5, monkeypatch)
    cut = inputs / "cut"
    assert [row["step"] for row in metrics(cut) if "loss" in row] == [3]
    with (cut / "metrics.jsonl").open("a") as file:  # as if more had been written than was saved
        file.write('{"step": 5, "loss": 0.0}\n')
    resumed = run_config(inputs, "cut", **{**LIKE, "training": {**SETTINGS, "resume_from_checkpoint": True}})
    train(resumed)
    assert "resuming at step 4 of 7" in capsys.readouterr().out
    same_run(inputs / "whole", cut)
    # Resuming what is finished changes nothing.
    train(resumed)
    same_run(inputs / "whole", cut)
    # From a checkpoint that is not the newest, and from that of another run.
    first, *_, last = steps_of(cut)
    settings = {**SETTINGS, "resume_from_checkpoint": str(cut / "checkpoints" / str(first))}
    train(run_config(inputs, "branch", **{**LIKE, "training": settings}))
    same_run(inputs / "whole", inputs / "branch")
    assert f"resuming at step {first} of 7" in capsys.readouterr().out
    train(run_config(inputs, "cut", **{**LIKE, "training": settings}))
    same_run(inputs / "whole", cut)
    assert f"{last}) are kept under names that end with .superseded" in capsys.readouterr().out


def test_a_checkpoint_of_other_rows_leaves_nothing_behind(inputs, monkeypatch):
    settings = {"max_steps": 4, "eval_strategy": "no", "eval_steps": None}
    cut_off(run_config(inputs, "rows", training=settings), 3, monkeypatch)
    settings |= {"resume_from_checkpoint": str(inputs / "rows"), "resume_changed": True}
    other = run_config(inputs, "other", training=settings, data={"train": str(inputs / "eval.jsonl")})
    for _ in range(2):
        with pytest.raises(InputError, match="other training rows"):
            train(other)
    assert not (inputs / "other" / "checkpoints").exists()


def a_run(folder: Path, *steps: int) -> Path:
    for step in steps:
        (folder / "checkpoints" / str(step)).mkdir(parents=True)
    return folder


def test_where_a_run_goes_on_from(tmp_path, monkeypatch):
    out, other = a_run(tmp_path / "out", 2, 10), a_run(tmp_path / "other", 4)
    monkeypatch.chdir(out)

    def point(value):
        found = ResumePoint.of(TrainingSection(output_dir=str(out), resume_from_checkpoint=value))
        return found and (found.run.resolve(), found.step, found.is_own)

    assert point(False) is None
    assert point(True) == (out, None, True)
    assert point(str(out)) == point("../out/checkpoints") == (out, None, True)
    assert point("checkpoints/2") == (out, 2, True)
    assert point("../other") == point(f"{other}/checkpoints/4") == (other, 4, False)


def test_what_is_no_checkpoint_is_refused(tmp_path):
    (tmp_path / "checkpoint-5").mkdir()
    (tmp_path / "checkpoint-5" / "trainer_state.json").touch()
    for name, words in (
        ("gone", "gone, which is not there; give a folder such as out/checkpoints/100"),
        ("", "which holds no checkpoint of a run"),
        ("checkpoint-5", "transformers' Trainer, .* give it as peft.init_from"),
    ):
        with pytest.raises(InputError, match=f"^training.resume_from_checkpoint is .*{words}"):
            ResumePoint.of(TrainingSection(resume_from_checkpoint=str(tmp_path / name)))


def test_resuming_without_a_checkpoint_starts_anew(inputs, monkeypatch, capsys):
    settings = {"max_steps": 2, "eval_strategy": "no", "eval_steps": None, "resume_from_checkpoint": True}
    run = run_config(inputs, "nothing", training=settings)
    cut_off(run, 1, monkeypatch)
    train(run)
    assert capsys.readouterr().out.count("starting at step 0") == 2
    assert [row["step"] for row in metrics(inputs / "nothing")] == [2]


def test_other_settings_cannot_be_resumed(inputs, monkeypatch):
    settings = {"max_steps": 4, "eval_strategy": "no", "eval_steps": None}
    cut_off(run_config(inputs, "changed", training=settings), 3, monkeypatch)
    settings["resume_from_checkpoint"] = True
    for section, change in (
        ("training", {"learning_rate": 0.5}),
        ("training", {"max_steps": 5}),
        ("training", {"seed": 1}),
        ("peft", {"r": 3}),
        ("data", {"max_length": 31}),
        ("model", {"dtype": "bfloat16"}),
    ):
        sections = {"training": settings, section: {**(settings if section == "training" else {}), **change}}
        with pytest.raises(InputError, match=rf"{section}\.{next(iter(change))} \("):
            train(run_config(inputs, "changed", **sections))
    chats = (inputs / "chats.jsonl").read_text()
    (inputs / "chats.jsonl").write_text(chats.replace('"content": "', '"content": "z', 1))
    try:
        with pytest.raises(InputError, match="other training rows"):
            train(run_config(inputs, "changed", training=settings))
    finally:
        (inputs / "chats.jsonl").write_text(chats)
    # What does not touch the weights may change.
    everything = train(run_config(inputs, "changed", training={**settings, "logging_steps": 1, "save_steps": 4}))
    assert everything["global_step"] == 4


def test_a_checkpoint_survives_the_donation_of_what_it_saves(tmp_path):
    """The file is written in the background, while the next steps reuse the arrays' memory."""
    model = tiny_model()
    run = run_config(tmp_path).training
    state, frozen, step = start(model, random_lora(model), run)
    batch = accumulated(random_rows([16, 16], 16), 1)
    checkpoints = Checkpoints(tmp_path / "checkpoints", None)
    expected = {}
    for number in range(1, 6):
        state = step(state, frozen, batch)
        expected[number] = [np.array(x) for x in jax.tree.leaves((state.trainable, state.opt_state, state.window))]
        checkpoints.save(number, state, {"number": number}, None)
    checkpoints.wait()
    for number, arrays in expected.items():
        saved, progress = checkpoints.restore(state, number)
        assert progress == {"number": number}
        assert saved.step == number
        assert saved.key == state.key
        for a, b in zip(jax.tree.leaves((saved.trainable, saved.opt_state, saved.window)), arrays, strict=True):
            np.testing.assert_array_equal(a, b)
    checkpoints.close()


@pytest.mark.parametrize(
    ("limit", "losses", "kept"),
    [
        (None, [3, 1, 2, 4], [1, 2, 3, 4]),
        (1, [None, None, None], [3]),
        (2, [3, 1, 2, 4], [2, 4]),
        (1, [3, 1, 2, 4], [2, 4]),  # as transformers: the newest to resume from, and the best
        (3, [1, 2, 3, None, 4], [1, 4, 5]),
        (2, [4, 3, 2, 1], [3, 4]),
    ],
)
def test_which_checkpoints_are_kept(tmp_path, limit, losses, kept):
    model = tiny_model(layers=1)
    state, _, _ = start(model, random_lora(model), run_config(tmp_path).training)
    checkpoints = Checkpoints(tmp_path / "checkpoints", limit)
    for number, loss in enumerate(losses, 1):
        checkpoints.save(number, state, {}, loss)
    checkpoints.wait()
    assert checkpoints.steps == kept
    checkpoints.close()
    assert sorted(int(p.name) for p in (tmp_path / "checkpoints").iterdir()) == kept


def test_a_checkpoint_of_another_adapter(tmp_path):
    model = tiny_model(layers=1)
    training = run_config(tmp_path).training
    checkpoints = Checkpoints(tmp_path / "checkpoints", None)
    checkpoints.save(1, start(model, random_lora(model), training)[0], {}, None)
    other = start(model, random_lora(model, target_modules=["qkv_proj"], r=2), training)[0]
    with pytest.raises(InputError, match="does not hold the state of this run"):
        checkpoints.restore(other)
    checkpoints.close()


RUN = """
import sys, yaml
from phi3_jax.config.run import RunConfig
from phi3_jax.training.loop import train
train(RunConfig.from_dict(yaml.safe_load(open(sys.argv[1]))))
"""


@pytest.mark.slow
@pytest.mark.parametrize("at_step", [11, 40])
def test_resuming_after_sigkill(inputs, tmp_path, at_step, capsys):
    like = {"data": {"packing": False}}
    settings = {"max_steps": 60, "logging_steps": 1, "save_steps": 3, "eval_steps": 20}
    train(run_config(inputs, f"unkilled{at_step}", **like, training=settings))
    killed = inputs / f"killed{at_step}"
    run = run_config(inputs, killed.name, **like, training={**settings, "resume_from_checkpoint": True})
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run.to_dict()))
    log = (tmp_path / "log").open("w")
    process = subprocess.Popen([sys.executable, "-c", RUN, str(tmp_path / "run.yaml")], stdout=log, stderr=log)
    deadline = time.monotonic() + 300
    lines = killed / "metrics.jsonl"
    while not (lines.exists() and f'"step": {at_step},' in lines.read_text()):
        assert process.poll() is None, (tmp_path / "log").read_text()
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (killed / "adapter").exists()
    train(run)
    assert "resuming at step" in capsys.readouterr().out
    same_run(inputs / f"unkilled{at_step}", killed)
