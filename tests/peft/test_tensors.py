"""PEFT's names of the tensors of adapters."""

from phi3_jax.peft.tensors import saved_names, tensor_names
from tests.helpers.models import random_lora, smallest_model


def test_names():
    adapters = dict(random_lora(smallest_model(), target_modules=["lm_head", "embed_tokens"]).items())
    assert tensor_names("lm_head", adapters["lm_head"]) == {
        "lora_A": "base_model.model.lm_head.lora_A.weight",
        "lora_B": "base_model.model.lm_head.lora_B.weight",
    }
    names = tensor_names("model.embed_tokens", adapters["model.embed_tokens"])
    assert names["lora_A"] == "base_model.model.model.embed_tokens.lora_embedding_A"
    assert saved_names("model.layers.mlp.down_proj", 2)[1] == "base_model.model.model.layers.1.mlp.down_proj.weight"
