"""Adapters written for PEFT."""

import json

from phi3_jax.peft.save import save_adapter
from tests.helpers.models import random_lora, smallest_model


def test_the_base_and_its_revision_stand_in_the_file_and_an_earlier_adapter_is_replaced(tmp_path):
    model, folder = smallest_model(), tmp_path / "adapter"
    save_adapter(folder, random_lora(model), base_model_name_or_path="some/base", revision="v2")
    raw = json.loads((folder / "adapter_config.json").read_text())
    assert (raw["base_model_name_or_path"], raw["revision"], raw["r"]) == ("some/base", "v2", 4)
    save_adapter(folder, random_lora(model, r=3))
    assert json.loads((folder / "adapter_config.json").read_text())["r"] == 3
    assert sorted(path.name for path in folder.iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]
