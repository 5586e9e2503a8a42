"""A run in progress: when it waits, what it keeps, when it stops."""

import math
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from phi3_jax.training import evaluation, trainer
from phi3_jax.training.job import load_job
from phi3_jax.training.loop import train
from tests.helpers.runs import metrics, run_config, weights, write_inputs


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    return write_inputs(tmp_path_factory.mktemp("trainer"))


def test_the_host_waits_at_logging_steps_only(inputs, monkeypatch):
    """Counts every way in which Python can look at an array's value."""
    looks: list[int] = []
    array_type = type(jnp.zeros(()))
    value = array_type._value
    monkeypatch.setattr(array_type, "_value", property(lambda self: looks.append(1) or value.__get__(self)))
    get, ready = jax.device_get, jax.block_until_ready
    monkeypatch.setattr(jax, "device_get", lambda x: looks.append(1) or get(x))
    monkeypatch.setattr(jax, "block_until_ready", lambda x: looks.append(1) or ready(x))
    run = run_config(
        inputs, "sync", data={"eval": None}, training={"eval_steps": None, "save_strategy": "no", "logging_steps": 4}
    )
    ongoing = trainer.Trainer(run, load_job(run))
    ongoing.begin()
    at_step = []
    for _ in range(6):
        ongoing._take_step()
        before = len(looks)
        ongoing._after_step()
        at_step.append((before, len(looks)))
    ongoing.close()
    assert looks, "the counters do not count"
    steps_alone = [at_step[i][0] - at_step[i - 1][1] for i in range(1, 6)]  # the first one compiles
    assert steps_alone == [0] * 5
    waited = [after > before for before, after in at_step]
    assert waited == [False, False, False, True, False, True]


def test_the_best_checkpoint_is_kept_and_loaded(inputs, monkeypatch):
    losses = iter([5.0, 3.0, 4.0, 4.5])  # before training, then after steps 2, 4, 6
    monkeypatch.setattr(evaluation, "evaluate_rows", scripted(losses))
    settings = {"eval_steps": 2, "save_steps": 1, "save_total_limit": 2, "load_best_model_at_end": True}
    run = run_config(inputs, "best", training=settings)
    everything = train(run)
    out = Path(run.training.output_dir)
    assert sorted(int(p.name) for p in (out / "checkpoints").iterdir()) == [2, 6]
    assert everything["eval_loss"] == 3.0
    two_steps = run_config(
        inputs, "best2", data={"eval": None}, training={"eval_steps": None, "save_strategy": "no", **stop_after(2)}
    )
    monkeypatch.setattr(trainer, "make_schedule", same_schedule(run))
    train(two_steps)
    assert weights(out / "adapter") == weights(Path(two_steps.training.output_dir) / "adapter")


def test_lines_by_epoch_and_checkpoints_of_the_best_by_accuracy(inputs, monkeypatch, capsys):
    accuracies = iter([0.1, 0.3, 0.2])  # after steps 3, 6 and 7; none before training

    def evaluate(*_):
        return {"eval_loss": 1.0, "eval_perplexity": 2.7, "eval_token_accuracy": next(accuracies)}

    monkeypatch.setattr(evaluation, "evaluate_rows", evaluate)
    settings = {
        "max_steps": 7,
        "logging_strategy": "epoch",
        "logging_steps": 5,
        "eval_steps": 0.35,
        "eval_on_start": False,
        "save_strategy": "best",
        "metric_for_best_model": "token_accuracy",
        "load_best_model_at_end": True,
        "lr_scheduler_type": "cosine_with_restarts",
        "lr_scheduler_kwargs": {"num_cycles": 2},
        "save_total_limit": 0,
    }
    everything = train(run_config(inputs, "accurate", training=settings))
    out, told = inputs / "accurate", capsys.readouterr().out
    assert sorted(int(p.name) for p in (out / "checkpoints").iterdir()) == [3, 6]
    assert everything["eval_token_accuracy"] == 0.3
    assert "loaded the best checkpoint, step 6" in told
    assert "token accuracy: 30.0% after" in told.lower()
    assert "; training.save_steps 2, since training.save_strategy is best" in told
    rows = metrics(out)
    assert [row["step"] for row in rows if "eval_loss" in row] == [3, 6, 7]
    steps = [int(row["step"]) for row in rows if "loss" in row]
    assert steps == [2, 4, 6, 7]  # of two steps an epoch
    report = (out / "report.html").read_text()
    assert "After training, on the evaluation rows" in report
    assert "<h2>Answers after</h2>" in report
    assert "Before" not in report


def scripted(losses):
    def evaluate(*args):
        loss = next(losses)
        return {"eval_loss": loss, "eval_perplexity": math.exp(loss), "eval_token_accuracy": 0.0}

    return evaluate


def stop_after(steps):
    return {"max_steps": steps}


def same_schedule(run):
    """The learning rates of a run of six steps, whatever the number of steps."""
    make = trainer.make_schedule
    return lambda training, total: make(run.training, 6)


def test_early_stopping(inputs, monkeypatch):
    losses = iter([5.0, 3.0, 4.0, 3.5, 1.0])
    monkeypatch.setattr(evaluation, "evaluate_rows", scripted(losses))
    run = run_config(inputs, "early", training={"eval_steps": 1, "early_stopping_patience": 2})
    everything = train(run)
    out = Path(run.training.output_dir)
    assert everything["global_step"] == 3
    assert everything["eval_loss"] == 3.5
    assert [row["step"] for row in metrics(out) if "loss" in row] == [2, 3]
    assert sorted(int(p.name) for p in (out / "checkpoints").iterdir()) == [2, 3]
