"""A run's uploads."""

import threading
from pathlib import Path

import pytest

from phi3_jax import InputError
from phi3_jax.config.run import RunConfig
from phi3_jax.config.training import TrainingSection
from phi3_jax.demo import demo_path
from phi3_jax.hf.push import HubRepository, PushError
from phi3_jax.training.loop import train
from phi3_jax.training.push import RunPush
from tests.helpers.commands import ROW
from tests.helpers.model_hub import TOKEN, taking_uploads


@pytest.fixture
def hub(monkeypatch):
    with taking_uploads(monkeypatch) as server:
        yield server


def checkpoint(folder: Path, step: int) -> Path:
    path = folder / "checkpoints" / str(step)
    (path / "state").mkdir(parents=True)
    for name in ("adapter_config.json", "adapter_model.safetensors", "manifest.json", "state/array"):
        (path / name).write_text("{}" if name == "adapter_config.json" else f"{step}")
    return path


def push_of(folder: Path, **settings: object) -> tuple[RunPush, list[str]]:
    training = TrainingSection(output_dir=str(folder), push_to_hub=True, **settings)
    said: list[str] = []
    assert training.push_target is not None
    return RunPush(training, training.push_target, said.append), said


EVERY = {
    "end": set(),
    "every_save": {"adapter_config.json", "adapter_model.safetensors"},
    "checkpoint": {"last-checkpoint/state/array", "last-checkpoint/manifest.json"},
    "all_checkpoints": {"checkpoint-1/state/array", "checkpoint-2/state/array"},
}


@pytest.mark.parametrize("strategy", EVERY)
def test_what_each_strategy_uploads(hub, tmp_path, strategy):
    folder = tmp_path / "run"
    push, said = push_of(folder, hub_strategy=strategy, hub_always_push=True)
    for step in (1, 2):
        push.checkpoint(checkpoint(folder, step))
    push._waiting.join()
    there = hub.models["me/run"]["main"]
    assert set(there) >= EVERY[strategy]
    assert ("last-checkpoint/state/array" in there) == (strategy == "checkpoint")
    assert ("checkpoint-1/state/array" in there) == (strategy == "all_checkpoints")
    if strategy == "end":
        assert (set(there), hub.messages) == ({".gitattributes"}, [])
    else:
        assert there["adapter_model.safetensors"] == b"2"
        assert "Training in progress, step 1" in hub.messages
    push.finish(checkpoint(folder, 3))
    assert hub.models["me/run"]["main"]["adapter_model.safetensors"] == b"3"
    assert hub.messages[-1] == "End of training"
    assert said[-1] == f"uploaded {folder / 'checkpoints/3'} to {hub.url}/me/run"
    assert not list(folder.glob(".pushing-*/*"))


def test_a_checkpoint_while_the_one_before_is_on_its_way_is_passed_over_and_failures_are_said(
    hub, tmp_path, monkeypatch
):
    folder = tmp_path / "run"
    push, said = push_of(folder)
    go, upload = threading.Event(), HubRepository.upload

    def slow(*arguments, **options):
        go.wait()
        return upload(*arguments, **options)

    monkeypatch.setattr(HubRepository, "upload", slow)
    push.checkpoint(checkpoint(folder, 1))
    push.checkpoint(checkpoint(folder, 2))
    assert "the checkpoint of step 2 is not uploaded" in said[-1]
    hub.down["/api/models/me/run/commit"] = 403
    go.set()
    push._waiting.join()
    assert "warning: the checkpoint of step 1 could not be uploaded: me/run: the token may not write" in said[-1]
    last = checkpoint(folder, 3)
    with pytest.raises(PushError, match="the run is complete.*export .*checkpoints/3 --push-to-hub me/run"):
        push.finish(last)


def settings(folder: Path, **training: object) -> RunConfig:
    return RunConfig.from_dict(
        {
            "model": {"name_or_path": str(demo_path("base")), "dtype": "float32"},
            "peft": {"r": 2, "target_modules": ["qkv_proj"]},
            "data": {"max_length": 64},
            "training": {"output_dir": str(folder), "max_steps": 2, "save_steps": 1, "push_to_hub": True, **training},
            "logging": {"tensorboard": False},
        }
    )


def test_what_is_wrong_shows_before_anything_is_loaded_or_written(hub, tmp_path):
    with pytest.raises(InputError, match="you is neither you, me"):
        train(settings(tmp_path / "out", hub_model_id="you/x"), train_dataset=[ROW])
    assert not (tmp_path / "out").exists()


def test_a_token_is_neither_written_nor_shown():
    training = TrainingSection(output_dir="runs/mine", push_to_hub=True, hub_token=TOKEN)
    assert training.push_target is not None
    assert (training.push_target.token, training.push_target.repo_id) == (TOKEN, "mine")
    run = RunConfig.from_dict({"model": {"name_or_path": "x"}, "training": {"hub_token": TOKEN}})
    assert run.training.hub_token == TOKEN
    assert TOKEN not in f"{run!r} {run.to_dict()} {run.to_yaml()} {training.push_target!r}"
    assert TrainingSection(hub_token="<HUB_TOKEN>").hub_token is None  # as transformers' to_dict has it


@pytest.mark.slow
def test_a_run(hub, tmp_path, capsys):
    run = settings(tmp_path / "out", hub_token=TOKEN, hub_strategy="checkpoint", hub_always_push=True)
    train(run, train_dataset=4 * [ROW])
    there = hub.models["me/out"]["main"]
    for file in (tmp_path / "out/adapter").iterdir():
        assert there[file.name] == file.read_bytes()
    assert "last-checkpoint/manifest.json" in there
    written = [file.read_bytes() for file in (tmp_path / "out").rglob("*") if file.is_file()]
    assert not any(TOKEN.encode() in content for content in [*written, *there.values()])
    assert TOKEN not in capsys.readouterr().out + repr(run)
    # An upload that fails does not lose the run.
    hub.down["/api/models/me/again/commit"] = 403
    with pytest.raises(PushError, match="the run is complete"):
        train(settings(tmp_path / "again"), train_dataset=4 * [ROW])
    assert (tmp_path / "again/all_results.json").exists()
    assert (tmp_path / "again/report.html").exists()
