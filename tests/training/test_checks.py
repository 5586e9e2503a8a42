"""A run's settings and folder, checked before anything is loaded."""

import re
from pathlib import Path

import pytest

from phi3_jax import InputError
from phi3_jax.training.checks import (
    check_batch,
    check_mesh,
    check_output_folder,
    check_unchanged,
    remove_leftovers,
)
from phi3_jax.training.loop import train
from tests.helpers.models import CONFIG
from tests.helpers.runs import cut_off, metrics, run_config, write_inputs

SHORT = {"max_steps": 4, "eval_strategy": "no", "eval_steps": None, "logging_steps": 1}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    return write_inputs(tmp_path_factory.mktemp("faults"))


def test_a_batch_that_no_memory_holds_is_refused_before_anything_is_compiled(inputs):
    check_batch(run_config(inputs))
    with pytest.raises(InputError, match=r"a step's batch has .* tokens for each device, which take .* GiB, and this"):
        check_batch(run_config(inputs, training={"per_device_train_batch_size": 10**9}))


def test_pieces_that_do_not_divide_a_row_are_refused(inputs):
    """Of what a device has of it."""
    run = run_config(inputs, training={"chunk_mlp": 4}, data={"max_length": 48})
    sizes = {"data": 1, "fsdp": 1, "tensor": 1, "context": 4}
    check_mesh(run, CONFIG, sizes)
    with pytest.raises(InputError, match=r"training\.chunk_mlp is 5, which does not divide the 12 positions that a"):
        check_mesh(run.changed({"training.chunk_mlp": 5}), CONFIG, sizes)
    with pytest.raises(InputError, match=r"training\.chunk_mlp is 0, expected at least 1"):
        run_config(inputs, training={"chunk_mlp": 0})
    with pytest.raises(
        InputError, match=r"training\.chunk_mlp is 'some', expected one of auto, none or a whole number"
    ):
        run_config(inputs, training={"chunk_mlp": "some"})


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


def test_leftovers_of_a_killed_run_are_removed(tmp_path):
    for folder in (f".adapter.{'0' * 32}", f"model/.saving-{'0' * 32}", "checkpoints.removing/3", "adapter"):
        (tmp_path / folder).mkdir(parents=True)
    for name in ("metrics.jsonl.tmp", "config.yaml.tmp", "report.html.tmp", "metrics.jsonl", "notes.tmp"):
        (tmp_path / name).write_text("{")
    remove_leftovers(tmp_path)
    left = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")}
    assert left == {"adapter", "model", "metrics.jsonl", "notes.tmp"}
