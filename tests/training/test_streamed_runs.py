"""Runs whose rows are read while they train."""

import json
from pathlib import Path

import pytest

from phi3_jax import InputError
from phi3_jax.training.loop import train
from tests.helpers.nonfinite import poison
from tests.helpers.runs import cut_off, metrics, run_config, same_run, write_inputs

DATA = {"streaming": True, "shuffle_buffer_size": 4, "packing": True}
SHORT = {"max_steps": 5, "eval_steps": 2, "save_steps": 2, "logging_steps": 3, "eval_generations": 0}
QUIET = {**SHORT, "eval_strategy": "no", "eval_steps": None, "save_strategy": "no"}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    return write_inputs(tmp_path_factory.mktemp("streamed"))


def test_a_run_that_is_cut_off_ends_as_one_that_nothing_disturbed(inputs, monkeypatch, capsys):
    train(run_config(inputs, "whole", data=DATA, training=SHORT))
    out = capsys.readouterr().out
    assert f"train: streamed from {inputs / 'chats.jsonl'}, shuffled through a buffer of 4 rows" in out
    assert "5 steps of 4 rows, adamw" in out  # and not a word of an epoch
    results = json.loads((inputs / "whole" / "all_results.json").read_text())
    assert results["train_samples"] > 13  # several epochs
    assert results["epoch"] == results["train_samples"] / 13
    assert f"train, streamed: {results['train_samples']} rows, {results['train_tokens']} tokens" in out
    resumed = run_config(inputs, "cut", data=DATA, training={**SHORT, "resume_from_checkpoint": True})
    cut_off(resumed, 3, monkeypatch)
    train(resumed)
    same_run(inputs / "whole", inputs / "cut")
    longer = {**SHORT, "max_steps": 7, "resume_from_checkpoint": True, "resume_changed": True}
    for change in ({"train": str(inputs / "eval.jsonl")}, {"shuffle_buffer_size": 5}):
        with pytest.raises(InputError, match="other training rows, batch sizes or seed"):
            train(run_config(inputs, "cut", data={**DATA, **change}, training=longer))


def test_a_generator_that_ends_ends_the_run(inputs, capsys):
    rows = [{"prompt": "a b", "completion": "b"}] * 9
    run = run_config(
        inputs, "once", data={**DATA, "train": None, "packing": False}, training={**SHORT, "save_steps": 3}
    )
    results = train(run, train_dataset=(row for row in rows))
    assert (results["global_step"], results["train_samples"]) == (3, 9)
    assert "no more rows after step 3 of 5: a generator gives its rows once; give a function" in capsys.readouterr().out
    assert [row["step"] for row in metrics(inputs / "once") if "eval_loss" in row] == [0, 2, 3]
    assert (inputs / "once" / "checkpoints" / "3").is_dir()


def test_a_row_that_cannot_be_read_costs_no_steps(inputs, capsys):
    rows = [{"prompt": "a b", "completion": "b"}] * 150 + [{"prompt": "a"}]
    settings = {**QUIET, "max_steps": 40}
    data = {"streaming": True, "shuffle": False, "packing": False, "train": None, "eval": None}
    run = run_config(inputs, "bad", data=data, training=settings)
    with pytest.raises(InputError, match="train_dataset, row 151: the columns prompt fit no format"):
        train(run, train_dataset=rows)
    assert "stopped: saved the checkpoint of step" in capsys.readouterr().out
    mended = run.changed({"training.resume_from_checkpoint": True})
    assert train(mended, train_dataset=[*rows[:150], rows[0]])["global_step"] == 40


def test_skipped_steps_are_named_with_their_rows(tmp_path, capsys):
    inputs = poison(write_inputs(tmp_path))
    train(run_config(inputs, data={**DATA, "eval": None}, training=QUIET))
    warnings = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning: step")]
    assert warnings
    for warning in warnings:
        assert f"the loss of {inputs / 'chats.jsonl'}, row 4 (" in warning


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"training": {"max_steps": -1}}, "data.streaming is true, .*; give training.max_steps"),
        ({"training": {"eval_strategy": "epoch"}}, "training.eval_strategy is epoch, but with data.streaming"),
        ({"training": {"save_strategy": "epoch"}}, "training.save_strategy is epoch, but with data.streaming"),
        ({"data": {"eval_fraction": 0.1, "eval": None}}, "data.eval_fraction is 0.1, but of rows that are streamed"),
        ({"data": {"streaming": False}}, "data.shuffle_buffer_size is 4, but only rows that are streamed"),
        ({"data": {"shuffle": False}}, "data.shuffle_buffer_size is 4, but only rows that are streamed"),
        ({"data": {"shuffle_buffer_size": 0}}, "data.shuffle_buffer_size is 0"),
        ({"data": {"max_length": 2**20}}, "set data.max_length"),
    ],
)
def test_settings_that_do_not_go_with_streaming(inputs, sections, message):
    with pytest.raises(InputError, match=message):
        train(run_config(inputs, "bad settings", **{**sections, "data": {**DATA, **sections.get("data", {})}}))


@pytest.mark.slow
def test_eva_looks_at_the_first_batches(inputs):
    settings = {**QUIET, "max_steps": 1}
    run = run_config(inputs, "eva", data={**DATA, "eval": None}, peft={"init_lora_weights": "eva"}, training=settings)
    assert train(run)["global_step"] == 1
    once = run.changed({"data.train": None, "training.output_dir": str(inputs / "once eva")})
    with pytest.raises(InputError, match="init_lora_weights is eva, .* train_dataset beforehand, but they can be had"):
        train(once, train_dataset=iter([{"prompt": "a", "completion": "b"}]))
