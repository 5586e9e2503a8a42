"""What the lines that begin with a slash do."""

import json

import pytest

from phi3_jax import InputError
from phi3_jax.config.generation import GenerationConfig
from phi3_jax.data.formats import Conversation, Turn, read_row
from tests.helpers.conversations import Model, silent, start


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> Model:
    return Model(monkeypatch, positions=100)


def test_settings_change_and_sampling_is_switched_on(model):
    session = start(model)
    session.set("max_new_tokens", 7)
    assert not session.settings.do_sample
    session.set("temperature", 0.7)
    session.set("stop_strings", ["a", "b"])
    assert session.settings == GenerationConfig(
        max_new_tokens=7, temperature=0.7, do_sample=True, stop_strings=("a", "b")
    )
    for name, value, words in [
        ("temprature", 1, "did you mean temperature"),
        ("temperature", -1, "temperature is -1"),
        ("seed", [1, 2], "expected a single value"),
        ("num_return_sequences", 2, "unknown setting"),
    ]:
        with pytest.raises(InputError, match=words):
            session.set(name, value)
    assert session.settings.temperature == 0.7


def test_what_is_saved_is_training_data(model, tmp_path):
    session = start(model, system="Be brief.")
    with pytest.raises(InputError, match="nothing to save"):
        session.save(tmp_path / "chats.jsonl")
    session.say("Zoë?\nYes", silent)
    for _ in range(2):
        session.save(tmp_path / "chats.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "chats.jsonl").read_text("utf-8").splitlines()]
    turns = (Turn("system", "Be brief."), Turn("user", "Zoë?\nYes"), Turn("assistant", "answer 1"))
    assert [read_row(row, "row") for row in rows] == [Conversation(turns)] * 2
    session.save(tmp_path / "one.json")
    assert json.loads((tmp_path / "one.json").read_text("utf-8")) == rows[0]
    session.save(tmp_path / "one.md")
    assert "**user**\n\nZoë?\nYes" in (tmp_path / "one.md").read_text("utf-8")
    with pytest.raises(InputError, match=r"one\.md exists already"):
        session.save(tmp_path / "one.md")
    with pytest.raises(InputError, match="cannot be written"):
        session.save(tmp_path / "no" / "folder.jsonl")
