"""Checkpoints that were cut off, damaged or refused by a disk."""

import errno
import json
import logging
import os
import shutil
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from phi3_jax import InputError
from phi3_jax.system import manifest
from phi3_jax.system.files import StorageError
from phi3_jax.training import checkpoints as checkpoints_module
from phi3_jax.training.checkpoints import Checkpoints
from phi3_jax.training.step import TrainState
from tests.helpers.models import random_lora, tiny_model
from tests.helpers.runs import run_config, start

NOTE = {"note": "what stands beside the arrays"}


@pytest.fixture(scope="module")
def first() -> TrainState:
    model = tiny_model(layers=1)
    return start(model, random_lora(model), run_config(Path()).training)[0]


def at(first: TrainState, step: int) -> TrainState:
    return jax.tree.map(lambda x: x + step if x.dtype == np.float32 else x, first)


@pytest.fixture(scope="module")
def three(first, tmp_path_factory) -> Path:
    """Checkpoints of the steps 1, 2 and 3."""
    folder = tmp_path_factory.mktemp("checkpoints")
    checkpoints = Checkpoints(folder, None)
    for step in (1, 2, 3):
        checkpoints.save(step, at(first, step), {**NOTE, "step": step}, float(step))
    checkpoints.close()
    return folder


@pytest.fixture
def folder(three, tmp_path) -> Path:
    shutil.copytree(three, tmp_path / "checkpoints")
    return tmp_path / "checkpoints"


def restored_step(folder: Path, like: TrainState, warn=lambda text: None) -> int:
    """Which step the newest checkpoint is of; that its arrays are that step's too."""
    checkpoints = Checkpoints(folder, None, warn)
    found, progress = checkpoints.restore(like)
    checkpoints.close()
    for a, b in zip(
        jax.tree.leaves(found.trainable), jax.tree.leaves(at(like, progress["step"]).trainable), strict=True
    ):
        np.testing.assert_array_equal(a, b)
    return progress["step"]


def largest(folder: Path) -> Path:
    return max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def change_loss(folder: Path) -> None:
    path = folder / "manifest.json"
    path.write_text(path.read_text().replace('"score": 3.0', '"score": 0.0'))


DAMAGES = {
    "arrays cut off": (lambda folder: os.truncate(largest(folder), 100), "has 100 bytes instead of"),
    "a bit of the arrays": (lambda folder: flip(largest(folder)), "is not what was written"),
    "a bit of the JSON": (lambda folder: flip(folder / "progress/data.json"), "data.json is not what was written"),
    "a bit of Orbax's own JSON": (lambda folder: flip(folder / "_CHECKPOINT_METADATA"), "METADATA is not what was"),
    "arrays missing": (lambda folder: largest(folder).unlink(), "is missing"),
    "a folder missing": (lambda folder: shutil.rmtree(folder / "state"), "is missing"),
    "no manifest": (lambda folder: (folder / "manifest.json").unlink(), "manifest.json is missing"),
    "a bit of the manifest": (lambda folder: flip(folder / "manifest.json"), "manifest.json is not what was written"),
    "another loss": (change_loss, "manifest.json is not what was written"),
    "a list for a manifest": (lambda folder: (folder / "manifest.json").write_text("[]"), "manifest.json is not what"),
    "an empty folder": (lambda folder: [shutil.rmtree(folder), folder.mkdir()], "manifest.json is missing"),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_newest_checkpoint_is_left_out_and_kept(folder, first, kind):
    damage, reason = DAMAGES[kind]
    damage(folder / "3")
    before = {path.name for path in (folder / "3").rglob("*")}
    warnings = []
    assert restored_step(folder, first, warnings.append) == 2
    (warning,) = warnings
    assert f"{folder / '3'}: the checkpoint is damaged" in warning
    assert reason in warning
    assert "kept as 3.damaged" in warning
    assert {path.name for path in (folder / "3.damaged").rglob("*")} == before
    assert restored_step(folder, first, warnings.append) == 2  # and no word of it any more
    assert len(warnings) == 1


def test_two_damaged_checkpoints_of_one_step_are_both_kept(folder, first):
    flip(largest(folder / "3"))
    checkpoints = Checkpoints(folder, None)
    checkpoints.restore(first)
    checkpoints.save(3, at(first, 3), {"step": 3}, None)
    checkpoints.close()
    flip(largest(folder / "3"))
    assert restored_step(folder, first) == 2
    assert sorted(path.name for path in folder.iterdir()) == ["1", "2", "3.damaged", "3.damaged2"]


def test_training_does_not_start_over_where_all_are_damaged(folder, first):
    for step in "123":
        flip(largest(folder / step))
    for _ in range(2):
        with pytest.raises(InputError, match=r"no checkpoint is left.*1\.damaged, 2\.damaged, 3\.damaged.*put a copy"):
            restored_step(folder, first)
    (folder / "2.damaged").rename(folder / "2")
    flip(largest(folder / "2"))
    assert restored_step(folder, first) == 2


def test_an_older_damaged_checkpoint_shows_on_opening(folder, first):
    os.truncate(largest(folder / "1"), 5)
    warnings = []
    assert restored_step(folder, first, warnings.append) == 3
    assert len(warnings) == 1
    assert "kept as 1.damaged" in warnings[0]


def test_a_damaged_best_checkpoint_is_told(folder, first):
    flip(largest(folder / "1"))
    checkpoints = Checkpoints(folder, None, lambda text: None)
    told = "/1: the checkpoint is damaged or gone; .* best set training.load_best_model_at_end false"
    with pytest.raises(InputError, match=told):
        checkpoints.restore(first, 1)
    checkpoints.close()


def test_what_a_kill_left_unfinished_is_removed(folder, first):
    shutil.copytree(folder / "3", folder / "4.saving")  # whole, but not renamed yet
    (folder / "5.saving.orbax-checkpoint-tmp" / "state").mkdir(parents=True)
    (folder / "1").rename(folder / "1.removing")
    shutil.rmtree(folder / "1.removing" / "state")
    assert restored_step(folder, first, pytest.fail) == 3
    assert sorted(path.name for path in folder.iterdir()) == ["2", "3"]


def test_a_step_that_is_saved_takes_over_a_loss(folder, first):
    checkpoints = Checkpoints(folder, 1)
    checkpoints.save(2, first, {"step": 0}, 0.5)
    checkpoints.close()
    checkpoints = Checkpoints(folder, 1)
    checkpoints.save(4, at(first, 4), {"step": 4}, 9.0)
    checkpoints.close()
    assert sorted(path.name for path in folder.iterdir()) == ["2", "4"]  # the best and the newest
    assert restored_step(folder, first) == 4


def test_a_full_disk_leaves_the_earlier_checkpoints(small_disk, first, caplog):
    caplog.set_level(logging.CRITICAL)
    checkpoints = Checkpoints(small_disk / "checkpoints", None)
    noise = np.random.default_rng(0)
    sizes = []

    def big(step: int) -> TrainState:  # nothing that could be compressed
        return jax.tree.map(lambda x: noise.random((1, 90, 90), np.float32) if x.ndim == 3 else x, at(first, step))

    def fill() -> None:
        for step in range(1, 30):
            whole = jax.device_put(big(step))
            sizes.append(sum(x.nbytes for x in jax.tree.leaves(whole)))
            checkpoints.save(step, whole, {"step": step}, None)
            checkpoints.wait()

    with pytest.raises(StorageError, match="No space left on device") as refused:
        fill()
    last = checkpoints.steps[-1]
    assert last >= 1
    message = str(refused.value)
    assert f"checkpoints/{last + 1}: cannot be written" in message
    needed, free = (int(text.replace(",", "")) for text in (message.split()[i] for i in places(message)))
    assert needed == pytest.approx(sizes[-1], rel=0.01)
    assert 0 < free < needed
    assert not list((small_disk / "checkpoints").glob("*.saving*"))
    checkpoints.close()
    _, progress = Checkpoints(small_disk / "checkpoints", None).restore(jax.device_put(big(0)))
    assert progress == {"step": last}


def places(message: str) -> list[int]:
    """Where the numbers of bytes stand: before the word."""
    return [i - 1 for i, word in enumerate(message.split()) if word == "bytes"]


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS, errno.EIO])
def test_a_disk_that_refuses_is_told(folder, first, monkeypatch, number):
    def refuse(path: Path, score: float | None) -> None:
        raise OSError(number, os.strerror(number), str(path))

    monkeypatch.setattr(checkpoints_module, "write_manifest", refuse)
    checkpoints = Checkpoints(folder, None)
    checkpoints.save(4, first, {"step": 4}, None)
    with pytest.raises(StorageError, match=rf"checkpoints/4: cannot be written \({os.strerror(number)}\)"):
        checkpoints.wait()
    assert checkpoints.steps == [1, 2, 3]
    checkpoints.close()
    assert sorted(path.name for path in folder.iterdir()) == ["1", "2", "3"]


def test_a_slow_disk_is_told(folder, first, monkeypatch):
    warnings = []
    checkpoints = Checkpoints(folder, None, warnings.append)
    monkeypatch.setattr(checkpoints_module, "PATIENCE", 0.05)
    write = checkpoints_module.write_manifest
    monkeypatch.setattr(checkpoints_module, "write_manifest", lambda *given: [time.sleep(0.1), write(*given)])
    checkpoints.save(4, first, {"step": 4}, None)
    assert not warnings
    checkpoints.save(5, first, {"step": 5}, None)
    checkpoints.close()
    assert len(warnings) == 1
    assert "waited 0 s for the checkpoint before" in warnings[0]


def test_the_manifest_names_every_file(folder):
    listed = json.loads((folder / "3" / manifest.NAME).read_text())["files"]
    found = {str(path.relative_to(folder / "3")) for path in (folder / "3").rglob("*") if path.is_file()}
    assert set(listed) | {manifest.NAME} == found
    assert any("ocdbt" in name for name in listed)
