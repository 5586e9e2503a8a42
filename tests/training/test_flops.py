"""The arithmetic of a training step."""

from phi3_jax.training.flops import matmul_parameters, step_flops
from tests.helpers.models import CONFIG, smallest_model


def test_every_weight_but_the_embeddings_is_multiplied_with():
    model = smallest_model()
    layers = model.model.layers
    linear = [layers.self_attn.qkv_proj, layers.self_attn.o_proj, layers.mlp.gate_up_proj, layers.mlp.down_proj]
    assert matmul_parameters(model.config) == sum(part.weight[...].size for part in [*linear, model.lm_head])


def test_an_adapter_saves_the_gradients_of_the_weights():
    full = step_flops(CONFIG, 0, True, 10, 0.0)
    assert full == 60 * matmul_parameters(CONFIG)
    assert step_flops(CONFIG, 7, False, 10, 0.0) == 40 * matmul_parameters(CONFIG) + 6 * 7 * 10
    assert step_flops(CONFIG, 0, True, 10, 3.0) - full == 12 * CONFIG.num_hidden_layers * CONFIG.hidden_size * 3
