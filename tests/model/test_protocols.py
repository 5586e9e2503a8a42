"""What a model asks of adapters."""

from phi3_jax.model.protocols import materialised
from tests.helpers.models import random_lora, smallest_model


def test_the_adapters_of_a_module_are_found_by_its_path():
    lora = random_lora(smallest_model(), target_modules=["down_proj"])
    assert set(materialised(lora, "model", "layers")) == {"mlp"}
    assert set(materialised(lora, "model", "layers", "mlp")) == {"down_proj"}
    assert materialised(lora, "model", "layers", "self_attn") == {}
    assert materialised(None, "model") == {}
