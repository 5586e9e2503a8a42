"""What the path of an adapter stands for."""

from pathlib import Path

import pytest

from phi3_jax import InputError
from phi3_jax.hf.checkpoint import Checkpoint
from phi3_jax.peft.adapter import PeftAdapter
from phi3_jax.peft.folder import adapter_folder
from phi3_jax.peft.save import save_adapter
from tests.helpers.models import random_lora, tiny_model


@pytest.fixture
def run(tmp_path) -> Path:
    """A run's folder, with nothing in it but its settings."""
    (tmp_path / "config.yaml").touch()
    return tmp_path


def test_a_runs_folder_stands_for_its_adapter(run):
    save_adapter(run / "adapter", random_lora(tiny_model(layers=1)))
    adapter = PeftAdapter.open(run)
    assert (adapter.name, adapter.folder) == (str(run), run / "adapter")
    assert adapter.config.r == 4


def test_an_adapter_with_a_folder_of_that_name_stands_for_itself(run):
    for folder in (run, run / "adapter"):
        folder.mkdir(exist_ok=True)
        (folder / "adapter_config.json").write_text("{}")
    assert adapter_folder(run) == run


def test_a_run_without_an_adapter_says_what_there_is(run):
    for step in ("9", "10", "11.saving"):
        (run / "checkpoints" / step).mkdir(parents=True)
    with pytest.raises(InputError, match=r"has not come to its end.*such as \S*/checkpoints/10, or resume it"):
        PeftAdapter.open(run)
    with pytest.raises(InputError, match=r"checkpoints: holds the checkpoints of a run; give one.*checkpoints/10$"):
        PeftAdapter.open(run / "checkpoints")
    (run / "model").mkdir()
    with pytest.raises(InputError, match=r"trained the whole model and no adapter; give \S*/model as the model"):
        PeftAdapter.open(run)


def test_a_run_given_as_a_model_says_where_that_is(run):
    (run / "model").mkdir()
    (run / "model" / "config.json").touch()
    for ask in (lambda: Checkpoint.open(run).config, lambda: Checkpoint.open(run).tokenizer):
        with pytest.raises(InputError, match=r"is a run, whose model is in \S*/model; give that"):
            ask()
    save_adapter(run / "adapter", random_lora(tiny_model(layers=1)))
    for folder in (run, run / "adapter"):
        with pytest.raises(InputError, match=r"/adapter: holds an adapter, no model; give its base.*--adapter \S+,"):
            _ = Checkpoint.open(folder).config
