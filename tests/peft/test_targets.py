"""PEFT's rules for what a file adapts."""

import pytest

from phi3_jax import InputError, Phi3ForCausalLM
from phi3_jax.peft.adapter import load_adapter
from phi3_jax.peft.save import save_adapter
from tests.helpers.models import smallest_model
from tests.helpers.peft_files import assert_same, edit_config, random_lora

LLAMA = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.fixture(scope="module")
def untied() -> Phi3ForCausalLM:
    return smallest_model()


def test_pefts_rules_for_what_a_file_adapts(untied, tmp_path):
    """Names given in full count whatever layers_to_transform says; what excludes nothing is no error here."""
    lora = random_lora(untied, target_modules=["lm_head", "model.layers.1.mlp.down_proj"])
    save_adapter(tmp_path, lora)
    edit_config(tmp_path, layers_to_transform=[0], exclude_modules=["score"], rank_pattern={"score": 3})
    assert_same(load_adapter(tmp_path, untied), lora)
    edit_config(tmp_path, target_modules=["lm_head", "down_proj"], layers_to_transform=1, exclude_modules=".*mlp")
    assert_same(load_adapter(tmp_path, untied), lora)
    saved = random_lora(untied, target_modules=["o_proj"], modules_to_save=["down_proj"])
    save_adapter(tmp_path / "saved", saved)
    edit_config(tmp_path / "saved", target_modules=["o_proj", "down_proj"])
    assert_same(load_adapter(tmp_path / "saved", untied), saved)
    edit_config(tmp_path, exclude_modules=r".*\.mlp\..*")
    with pytest.raises(InputError, match=r"2 unknown \(base_model.model.model.layers.1.mlp.down_proj.lora_A.weight"):
        load_adapter(tmp_path, untied)


def test_names_of_llama_models_beside_phi3s(untied, tmp_path):
    lora = random_lora(untied, target_modules=["o_proj", "down_proj"])
    save_adapter(tmp_path, lora)
    edit_config(tmp_path, target_modules=LLAMA)
    assert_same(load_adapter(tmp_path, untied), lora)
