"""A base's weights as initialisers and merges see them."""

import numpy as np

from phi3_jax.lora.base_weights import holds_quantized, weight_rows, weight_shape
from phi3_jax.quant import quantize_model
from tests.helpers.models import quantizable_model


def test_shapes_and_rows(tiny):
    model = tiny()
    assert weight_shape(model, "model.layers.mlp.down_proj") == (3, 16, 28)
    rows = weight_rows(model, "lm_head", (4, 1))
    np.testing.assert_array_equal(rows, np.asarray(model.lm_head.weight[...])[[4, 1]])


def test_what_is_quantised_is_known():
    model = quantize_model(quantizable_model(num_hidden_layers=1), "int8")
    assert holds_quantized(model, "model.layers.mlp.down_proj")
    assert not holds_quantized(model, "lm_head")
