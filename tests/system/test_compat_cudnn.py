"""Insides of JAX's binding of cuDNN: red where they change."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo as cudnn

from phi3_jax.model.attention import run_kind
from phi3_jax.system.compat_cudnn import masked_attention
from phi3_jax.system.compat_xla import is_cudnn_attention
from tests.helpers.attention import assert_close, inputs, packed, program, reference


@pytest.mark.parametrize("is_causal", [True, False])
def test_the_mask_goes_in_and_no_gradient_of_it_comes_out(monkeypatch, is_causal):
    monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 91000)
    q, k, v, d_out = inputs(16, 4, 2, dtype=jnp.bfloat16)
    mask = jnp.ones((2, 1, 16, 16), bool)

    def gradients(q, k, v, d_out):
        return jax.vjp(lambda *x: masked_attention(*x, mask, is_causal=is_causal), q, k, v)[1](d_out)

    equations = {
        equation.primitive.name: equation
        for equation in jax.make_jaxpr(gradients)(q, k, v, d_out).jaxpr.eqns
        if "dot_product_attention" in equation.primitive.name
    }
    forward, backward = equations.values()
    assert is_cudnn_attention(forward.primitive)
    assert backward.primitive.name == "dot_product_attention_bwd_wrapper"
    for equation in (forward, backward):
        assert equation.params["variadic_args"] == (True, False)
        assert equation.params["dropout_rate"] == 0
        assert equation.params["scale"] == 8**-0.5
        assert equation.params["sliding_window_length"] is None
        wanted = cudnn.MaskType.CAUSAL if is_causal else cudnn.MaskType.NO_MASK
        assert equation.params["mask_type"] == wanted
        assert equation.invars[3].aval.shape == (2, 1, 16, 16)
    assert [out.aval.shape for out in backward.outvars] == [q.shape, k.shape, v.shape]


def test_a_bias_hides_what_the_mask_hides():
    bias = np.asarray(cudnn.combine_bias_and_mask(None, jnp.array([True, False]).reshape(1, 1, 1, 2), jnp.bfloat16))
    assert bias[0, 0, 0, 0] == 0
    assert np.exp(np.float32(bias[0, 0, 0, 1])) == 0


@pytest.mark.skipif(jax.default_backend() != "gpu", reason="there is no GPU here")
@pytest.mark.parametrize("window", [None, 70])
def test_cudnn_computes_what_the_definition_says(window):
    arrays, ids = inputs(320, 4, 2, head_dim=96, dtype=jnp.bfloat16), packed(320)
    expected = reference(*arrays, ids, window)
    assert_close(program("cudnn", window)(*arrays, ids), expected, 2e-2)
    assert_close(jax.jit(lambda *x: (run_kind("chunked", *x, window),))(*arrays[:3], ids), expected[:1], 2e-2)
