"""Where an evaluation keeps what it has found."""

import json

import pytest
import yaml

from phi3_jax.config.sections import DataSection
from phi3_jax.evaluate.predictions import PredictionFile, weights_fingerprint
from phi3_jax.system.errors import InputError
from phi3_jax.system.manifest import write_manifest
from tests.helpers.evaluations import ROWS, run
from tests.helpers.rows import write_chats


def test_only_the_same_evaluation_goes_on(inputs, tmp_path):
    run(inputs, tmp_path / "out")
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    other = write_chats(tmp_path / "chats.jsonl", number=ROWS, seed=9)
    for more, words in (
        ({"max_new_tokens": 5}, r"generation.max_new_tokens \(6 then, 5 now\)"),
        ({"metrics": "loss"}, "metrics"),
        ({"adapters": {"one": inputs / "two" / "adapter"}}, "models.one.weights"),
        ({"data": DataSection(train=str(other), max_length=32)}, "data.rows"),
    ):
        with pytest.raises(InputError, match=words):
            run(inputs, tmp_path / "out", **more)
    assert {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()} == before
    # How many rows are side by side does not matter, and another model may join.
    run(inputs, tmp_path / "out", batch_size=5)
    joined = run(inputs, tmp_path / "out", adapters={"two": inputs / "two" / "adapter"})
    assert list(joined.models) == ["base", "two"]


def test_a_folder_of_something_else_is_left_alone(inputs, tmp_path):
    (tmp_path / "config.yaml").write_text("model:\n  name_or_path: x\n")
    with pytest.raises(InputError, match="another kind of run"):
        run(inputs, tmp_path)
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="is a file, expected a folder"):
        run(inputs, tmp_path / "file" / "out")
    assert yaml.safe_load((tmp_path / "config.yaml").read_text()) == {"model": {"name_or_path": "x"}}
    folder = tmp_path / "broken"
    run(inputs, folder, metrics="loss")
    file = folder / "predictions" / "one.jsonl"
    file.write_text("nonsense\n" + file.read_text())
    with pytest.raises(InputError, match=r"one\.jsonl, line 1: is no prediction"):
        run(inputs, folder, metrics="loss")


def test_checkpoints_that_hold_a_state_alone_have_fingerprints_of_their_own(tmp_path):
    for name in ("one", "other"):
        (tmp_path / name / "state").mkdir(parents=True)
        (tmp_path / name / "state" / "x").write_text(name)
        write_manifest(tmp_path / name)
    assert weights_fingerprint(tmp_path / "one") != weights_fingerprint(tmp_path / "other")


@pytest.mark.parametrize(
    "change",
    [
        {"id": "0"},
        {"id": True},
        {"prompt": 5},
        {"reference": None},
        {"scores": []},
        {"scores": {"loss": "low"}},
        {"scores": {"loss": float("nan")}},
        {"x": 1},
    ],
    ids=str,
)
def test_a_line_of_other_values_is_named(change, tmp_path):
    line = {"id": 0, "prompt": "a", "reference": "b", "answer": None, "finish_reason": None, "scores": {"loss": 1.5}}
    file = tmp_path / "base.jsonl"
    file.write_text(json.dumps(line) + "\n")
    assert PredictionFile(file, 1).found[0].scores == {"loss": 1.5}
    file.write_text(json.dumps({**line, **change}) + "\n")
    with pytest.raises(InputError, match=r"base\.jsonl, line 1: is no prediction \(.*\); remove the file"):
        PredictionFile(file, 1)
