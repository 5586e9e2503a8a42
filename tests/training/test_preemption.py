"""SIGTERM and SIGINT."""

import signal
from pathlib import Path

import pytest

from phi3_jax.config.run import RunConfig
from phi3_jax.training import evaluation, loop
from phi3_jax.training.loop import train
from tests.helpers.runs import SETTINGS, metrics, run_config, same_run, write_inputs

# As test_resume's, in rows of one length: one program.
LIKE = {"data": {"packing": True}, "training": {**SETTINGS, "eval_generations": 1}}


SHORT = {"max_steps": 4, "eval_strategy": "no", "eval_steps": None, "logging_steps": 1}


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
