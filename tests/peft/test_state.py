"""Adapters out of the state of checkpoints of the version before, and what its state does not tell."""

import json
import shutil
from pathlib import Path

import pytest
import yaml

from phi3_jax import InputError
from phi3_jax.cli import main
from phi3_jax.hf.checkpoint import Checkpoint
from phi3_jax.peft.adapter import PeftAdapter
from phi3_jax.peft.save import save_adapter

BEFORE = Path(__file__).parents[1] / "from_before"


@pytest.fixture
def before(tmp_path, monkeypatch) -> Path:
    """A copy of what version 0.1.0 wrote: its runs name their base from there."""
    for name in ("base", "by_layer"):
        shutil.copytree(BEFORE / name, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def edit(run: Path, section: str, **values: object) -> None:
    raw = yaml.safe_load((run / "config.yaml").read_text())
    raw[section] |= values
    (run / "config.yaml").write_text(yaml.safe_dump(raw))


def test_a_checkpoint_of_the_version_before_is_an_adapter(before):
    adapter = PeftAdapter.open("by_layer/checkpoints/2")
    assert (adapter.base, adapter.revision, adapter.has_tokenizer) == ("base", None, False)
    lora = adapter.load(Checkpoint.open("base").shapes)
    save_adapter(before / "saved", lora)
    entries = json.loads((before / "saved" / "adapter_config.json").read_text())
    assert (entries["use_dora"], entries["trainable_token_indices"]) == (True, [3, 5])


@pytest.mark.parametrize(
    ("section", "values", "why"),
    [
        ("peft", {"full_finetuning": True}, "the run trained the whole model"),
        ("peft", {"init_from": "first"}, r"it began with first \(peft.init_from\)"),
        ("peft", {"init_lora_weights": "pissa", "use_dora": False}, "it began with peft.init_lora_weights pissa"),
        ("training", {"optim": "lorafa"}, "half of the adapter is not in its state"),
    ],
)
def test_what_the_state_does_not_tell_is_said(before, section, values, why):
    edit(before / "by_layer", section, **values)
    with pytest.raises(InputError, match=f"by_layer/checkpoints/2: is the state of a run without .*{why}"):
        _ = PeftAdapter.open("by_layer/checkpoints/2").config


def test_a_state_alone_or_of_another_model_is_one_line(before, capsys):
    argv = ["generate", "--adapter", "by_layer/checkpoints/2", "--prompt", "x"]
    edit(before / "by_layer", "peft", r=3)
    assert main(argv) == 2
    assert "its state does not fit the model and the run's config.yaml" in capsys.readouterr().err
    (before / "by_layer" / "config.yaml").unlink()
    with pytest.raises(InputError, match=r"which only by_layer/config\.yaml could tell how to read"):
        _ = PeftAdapter.open("by_layer/checkpoints/2").config
