"""The adapters by themselves: against formulas written out, and their starts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import phi3_jax.loralib as lora
from phi3_jax import InputError
from phi3_jax.loralib.kernels import to_kernel, to_weight
from phi3_jax.loralib.own_adapters import new_adapter

KEY = jax.random.key(0)


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape).astype(np.float32))


def test_merged_linear_is_one_lora_for_each_enabled_slice():
    a, b, x, y = normal(2 * 3, 5), normal(3 * 4, 2, seed=1), normal(6, 5, seed=2), normal(6, 16, seed=3)
    adapter = lora.LoraMergedLinear(a, b, (True, False, True, True), scaling=0.5)
    expected = np.array(y)
    for block, piece in enumerate([0, 2, 3]):
        update = x @ a[2 * block : 2 * block + 2].T @ b[4 * block : 4 * block + 4].T
        expected[:, 4 * piece : 4 * piece + 4] += 0.5 * update
    np.testing.assert_allclose(adapter(y, x, None), expected, rtol=1e-5, atol=1e-5)
    weight = normal(16, 5, seed=4)
    np.testing.assert_allclose(x @ adapter.merged(weight).T, x @ weight.T + expected - y, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(adapter.unmerged(adapter.merged(weight)), weight, atol=1e-6)
    np.testing.assert_array_equal(adapter.merged(weight)[4:8], weight[4:8])  # the disabled slice, to the bit


def test_merged_linear_drops_its_input():
    x = jnp.ones((1, 1000))
    adapter = lora.LoraMergedLinear(jnp.eye(1000), jnp.ones((1, 1000)), (True, False), 1.0, dropout=0.25)
    kept = adapter(jnp.zeros((1, 2)), x, None, KEY)[0]
    # 1000 draws of 1/0.75 or 0 have mean 1000 and standard deviation 18.3.
    assert abs(kept[0] - 1000) < 60
    assert kept[0] != 1000
    assert kept[1] == 0
    np.testing.assert_allclose(adapter(jnp.zeros((1, 2)), x, None)[0, 0], 1000)


def test_arithmetic_is_the_adapters_and_the_result_the_layers():
    adapter = lora.LoraMergedLinear(jnp.array([[1.0, 2.0**-8 + 2.0**-20 - 1]]), jnp.ones((1, 1)), (True,), 1.0)
    out = adapter(jnp.ones((1, 1), jnp.bfloat16), jnp.ones((1, 2), jnp.bfloat16), None)
    assert out.dtype == jnp.bfloat16
    assert float(out[0, 0]) == 1 + 2.0**-7  # 1 + 2⁻⁸ alone would round to 1


@pytest.mark.parametrize(
    ("window", "groups", "a_shape", "b_shape"),
    [
        ((3,), 1, (6, 4 * 3), (8, 6)),
        ((3, 3), 1, (6, 4 * 3), (8 * 3, 6)),
        ((3, 3), 2, (6, 4 * 3), (4 * 3, 6)),
        ((3, 3, 3), 2, (6, 4 * 9), (4 * 3, 6)),
        ((1, 5), 1, (10, 4 * 5), (8, 10)),
    ],
    ids=str,
)
def test_conv_shapes_give_as_many_entries_as_the_weight_has(window, groups, a_shape, b_shape):
    conv = nnx.eval_shape(lambda: nnx.Conv(4, 8, window, feature_group_count=groups, rngs=nnx.Rngs(0)))
    adapter = new_adapter(conv, lora.Config(2), KEY)
    assert (adapter.lora_A.shape, adapter.lora_B.shape) == (a_shape, b_shape)
    weight = jax.ShapeDtypeStruct((8, 4 // groups, *window), jnp.float32)
    assert jax.eval_shape(lambda a, w: a.merged(w), adapter, weight).shape == weight.shape


def test_conv_adds_the_product_as_it_lies_in_memory():
    a, b, weight = normal(6, 4 * 3), normal(8 * 3, 6, seed=1), normal(8, 4, 3, 3, seed=2)
    adapter = lora.LoraConv(a, b, scaling=0.5)
    expected = weight + 0.5 * (np.asarray(b) @ np.asarray(a)).reshape(8, 4, 3, 3)
    np.testing.assert_allclose(adapter.merged(weight), expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(adapter.unmerged(adapter.merged(weight)), weight, atol=1e-5)


def test_starts_have_loralibs_distributions():
    linear = nnx.eval_shape(lambda: nnx.Linear(400, 30, rngs=nnx.Rngs(0)))
    conv = nnx.eval_shape(lambda: nnx.Conv(100, 8, (2, 2), rngs=nnx.Rngs(0)))
    merged = lora.Config(25, 50, enable_lora=[True, False, True])
    for layer, config, bound in [
        (linear, lora.Config(50, 100), 400),
        (linear, merged, 400),
        (conv, lora.Config(25, 50), 200),
    ]:
        adapter = new_adapter(layer, config, KEY)
        a = np.asarray(adapter.lora_A) * np.sqrt(bound)  # uniform in ±1
        assert 0.999 < np.abs(a).max() <= 1
        assert a.var() == pytest.approx(1 / 3, rel=0.03)  # 10,000 draws or more: 0.9%
        assert abs(a.mean()) < 0.02
        assert not np.any(adapter.lora_B)
        assert adapter.scaling == 2
        assert adapter.lora_A.dtype == adapter.lora_B.dtype == jnp.float32
    embed = nnx.eval_shape(lambda: nnx.Embed(50, 300, rngs=nnx.Rngs(0)))
    adapter = new_adapter(embed, lora.Config(50, 100), KEY)
    assert not np.any(adapter.lora_A)
    assert np.asarray(adapter.lora_B).std() == pytest.approx(1, rel=0.03)
    assert np.abs(adapter.lora_B).max() > 3


def test_weights_there_and_back():
    general = nnx.eval_shape(lambda: nnx.LinearGeneral((2, 3), (4, 5), axis=(-2, -1), rngs=nnx.Rngs(0)))
    conv = nnx.eval_shape(lambda: nnx.Conv(6, 8, (2, 3), feature_group_count=2, rngs=nnx.Rngs(0)))
    for layer, shape in [(general, (20, 6)), (conv, (8, 3, 2, 3))]:
        for stack in [(), (7,)]:
            kernel = normal(*stack, *layer.kernel.shape)
            weight = to_weight(layer, kernel)
            assert weight.shape == (*stack, *shape)
            np.testing.assert_array_equal(to_kernel(layer, weight), kernel)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"r": 0}, "r is 0; expected a whole number of at least 1"),
        ({"r": 2.5}, "r is 2.5; expected a whole number"),
        ({"r": 2, "lora_alpha": 0}, "lora_alpha is 0; expected a positive number"),
        ({"r": 2, "lora_dropout": 1.0}, "lora_dropout is 1.0; expected at least 0 and less than 1"),
        (
            {"r": 2, "enable_lora": [False, False]},
            "enables no slice; enable one, or leave the layer without an adapter",
        ),
        ({"r": 2, "enable_lora": []}, "enables no slice"),
    ],
    ids=str,
)
def test_config_refuses(settings, message):
    with pytest.raises(InputError, match=message) as error:
        lora.Config(**settings)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda rngs: lora.MergedLinear(4, 16, r=2, enable_lora=[True, False, True], rngs=rngs),
            "enable_lora has 3 entries, which do not divide the 16 output features",
        ),
        (lambda rngs: lora.MergedLinear(4, 16, r=2, rngs=rngs), "enable_lora is .False., which enables no slice"),
        (
            lambda rngs: lora.Conv2d(4, 4, 3, r=2, lora_dropout=0.1, rngs=rngs),
            "lora_dropout has no effect on Conv in loralib; leave it out there",
        ),
        (lambda rngs: lora.Conv2d(4, 4, (3, 3), r=2, rngs=rngs), "kernel_size is .3, 3.; expected one number"),
        (lambda rngs: lora.Linear(4, 4, r=-1, rngs=rngs), "r is -1; expected a whole number of at least 1"),
        (
            lambda rngs: new_adapter(nnx.Embed(3, 4, rngs=rngs), lora.Config(2, enable_lora=[True]), KEY),
            "enable_lora is for linear layers, not for Embed",
        ),
    ],
)
def test_layers_refuse_what_is_for_others(make, message):
    with pytest.raises(InputError, match=message) as error:
        nnx.eval_shape(lambda: make(nnx.Rngs(0)))
    assert "\n" not in str(error.value)


def test_nothing_enabled_and_no_rank_is_the_plain_layer():
    layer = nnx.eval_shape(lambda: lora.MergedLinear(4, 16, rngs=nnx.Rngs(0)))
    assert layer.adapter() is None
    assert set(nnx.state(layer)) == {"kernel", "bias"}
