"""The model card."""

import pytest

from phi3_jax import Phi3ForCausalLM
from phi3_jax.peft.save import save_adapter
from tests.helpers.models import smallest_model
from tests.helpers.peft_files import random_lora, tensors


@pytest.fixture(scope="module")
def untied() -> Phi3ForCausalLM:
    return smallest_model()


def test_model_card_of_variants(untied, tmp_path):
    config = {
        "target_modules": ["qkv_proj", "o_proj", "lm_head", "model.layers.1.mlp.down_proj"],
        "exclude_modules": r".*layers\.1\.self_attn.*",
        "use_dora": True,
        "rank_pattern": {"o_proj": 3},
        "modules_to_save": ["norm"],
        "trainable_token_indices": [3, 4],
        "init_lora_weights": "gaussian",
    }
    save_adapter(tmp_path, random_lora(untied, **config))
    card = (tmp_path / "README.md").read_text()
    count = sum(tensor.size for tensor in tensors(tmp_path).values())
    for row in (
        f"{count:,} parameters",
        "| kind | DoRA, started as gaussian |",
        "| modules | down_proj (layers 1), lm_head, o_proj (layers 0, 2), qkv_proj (layers 0, 2) |",
        "| rank r | 2, 3 in o_proj |",
        "| α | 8 |",
        "| scale (α/r) | by module |",
        "| whole modules | input_layernorm, model.norm, post_attention_layernorm |",
        "| rows of tokens | 2 of embed_tokens |",
    ):
        assert row in card
