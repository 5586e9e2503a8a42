"""What a run's folder tells: how far it came, how it ended, and how to go on."""

import json
import os

import pytest

from phi3_jax.config.run import RunConfig
from phi3_jax.config.sections import EVAL_IN_MEMORY
from phi3_jax.system.lock import RunLock
from phi3_jax.system.manifest import write_manifest
from phi3_jax.training.run_info import is_run, print_run, run_info

SETTINGS = {
    "model": {"name_or_path": "org/base", "revision": "v1", "quantization": "nf4"},
    "peft": {"r": 8, "target_modules": ["o_proj", "qkv_proj"]},
    "data": {"train": "chats.jsonl", "eval_fraction": 0.1},
    "training": {"num_train_epochs": 3, "eval_strategy": "epoch"},
}
ROWS = [
    {"step": 0, "epoch": 0.0, "eval_loss": 4.0},
    {"step": 5, "epoch": 0.5, "loss": 3.0},
    {"step": 10, "epoch": 1.0, "loss": 2.0},
    {"step": 10, "epoch": 1.0, "eval_loss": 1.5},
    {"step": 20, "epoch": 2.0, "loss": 1.0},
    {"step": 20, "epoch": 2.0, "eval_loss": 1.75},
]


@pytest.fixture
def folder(tmp_path):
    """Of a run that was killed after step 20, while it wrote a line."""
    folder = tmp_path / "a run"
    for step in (10, 20):
        checkpoint = folder / "checkpoints" / str(step)
        checkpoint.mkdir(parents=True)
        (checkpoint / "adapter_config.json").write_text("{}")
        write_manifest(checkpoint, 1.5 if step == 10 else None)
    (folder / "config.yaml").write_text(RunConfig.from_dict(SETTINGS).to_yaml())
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS) + '{"step": 30, "lo')
    (folder / "versions.json").write_text('[{"device": "old"}, {"device": "cpu", "jax": "1.2"}]')
    return folder


def finish(folder, epoch=3.0):
    (folder / "adapter").mkdir()
    (folder / "all_results.json").write_text(json.dumps({"global_step": 30, "epoch": epoch, "eval_loss": 1.5}))


def shown(folder, capsys):
    print_run(str(folder), run_info(folder))
    return capsys.readouterr().out


def test_a_run_that_was_killed_says_how_to_go_on(folder, capsys):
    info = run_info(folder)
    assert (info["state"], info["steps"], info["epochs"], info["of"]["epochs"]) == ("stopped", 20, 2.0, 3)
    assert info["best"] == {"metric": "eval_loss", "step": 10, "value": 1.5}
    assert (info["device"], info["weights"], info["revision"]) == ("cpu", None, "v1")
    assert [entry["figure"] for entry in info["checkpoints"]] == [1.5, None]
    said = shown(folder, capsys)
    for words in (
        "the checkpoint of step 20 is the newest",
        "org/base at v1, bfloat16, kept in nf4",
        "LoRA r 8, lora_alpha 32.0, on o_proj, qkv_proj",
        "chats.jsonl; evaluated on 0.1 of the training rows",
        "20 (2 of 3 epochs)",
        "3 at step 5, 1 at step 20",
        "4 at step 0, 1.75 at step 20",
        f"phi3-jax train --config '{folder}/config.yaml' --training.resume_from_checkpoint true",
        f"phi3-jax chat --adapter '{folder}/checkpoints/20'",
    ):
        assert words in said


def test_a_run_that_came_to_its_end_says_what_to_do_with_it(folder, capsys):
    finish(folder)
    info = run_info(folder)
    assert (info["state"], info["weights"]) == ("finished", str(folder / "adapter"))
    assert info["next"][-1] == f"phi3-jax export '{folder}' --merge --output '{folder}/merged'"
    assert "it came to its end at step 30\n" in shown(folder, capsys)


def test_a_run_whose_patience_was_over_says_so(folder):
    settings = {**SETTINGS, "training": {**SETTINGS["training"], "early_stopping_patience": 1}}
    (folder / "config.yaml").write_text(RunConfig.from_dict(settings).to_yaml())
    finish(folder, epoch=2.0)
    assert "early_stopping_patience" in run_info(folder)["ended"]


@pytest.mark.parametrize(("max_steps", "is_early"), [(30, False), (40, True)])
def test_patience_is_told_from_an_end_by_steps(folder, max_steps, is_early):
    settings = {**SETTINGS, "training": {"eval_steps": 5, "early_stopping_patience": 1, "max_steps": max_steps}}
    (folder / "config.yaml").write_text(RunConfig.from_dict(settings).to_yaml())
    finish(folder, epoch=0.5)
    assert ("early_stopping_patience" in run_info(folder)["ended"]) == is_early


def test_checkpoints_show_the_figure_that_they_are_compared_by(folder, capsys):
    settings = {**SETTINGS, "training": {**SETTINGS["training"], "metric_for_best_model": "token_accuracy"}}
    (folder / "config.yaml").write_text(RunConfig.from_dict(settings).to_yaml())
    write_manifest(folder / "checkpoints" / "10", -0.25)  # a score, of which less is better
    assert "10 (eval_token_accuracy 0.25), 20\n" in shown(folder, capsys)


def test_named_sets_in_memory_are_to_be_given_again(folder):
    data = {"train": "chats.jsonl", "eval": {"chats": EVAL_IN_MEMORY}}
    (folder / "config.yaml").write_text(RunConfig.from_dict({**SETTINGS, "data": data}).to_yaml())
    assert run_info(folder)["next"][0].startswith("p3.train(run, train_dataset=...")


def test_a_run_that_goes_on_says_so_and_proposes_nothing(folder):
    lock = RunLock.take(folder)
    try:
        info = run_info(folder)
    finally:
        lock.release()
    assert (info["state"], info["next"]) == ("running", [])
    assert f"process {os.getpid()} on" in info["ended"]


def test_weights_without_results_are_what_numbers_that_are_not_finite_leave(folder):
    (folder / "adapter").mkdir()
    assert run_info(folder)["state"] == "not finite"


def test_a_damaged_checkpoint_is_named(folder, capsys):
    (folder / "checkpoints" / "20" / "adapter_config.json").write_text("{ }")
    assert "damaged: adapter_config.json" in shown(folder, capsys)


def test_other_folders_are_no_runs(folder, tmp_path):
    assert is_run(folder)
    (tmp_path / "config.yaml").write_text("model: {}")
    assert not is_run(tmp_path)
