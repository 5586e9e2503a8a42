"""States of 8 bits: what is quantised, and that blocks are those of one layer."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from phi3_jax.config.training import TrainingSection
from phi3_jax.optim.adam8bit import QuantizedMoment, bias_correction, dequantize, nearest_code, quantize
from phi3_jax.optim.optimizer import make_optimizer
from phi3_jax.optim.schedule import make_schedule
from phi3_jax.quant.dynamic import dynamic_map
from phi3_jax.training.checkpoints import Checkpoints
from phi3_jax.training.step import TrainState


def make(**training):
    section = TrainingSection(
        **{
            "optim": "adamw_8bit",
            "learning_rate": 0.1,
            "lr_scheduler_type": "constant",
            "max_grad_norm": 0.0,
            **training,
        }
    )
    return make_optimizer(section, make_schedule(section, 10))


def moments(state):
    return state[1].mu, state[1].nu


@pytest.mark.parametrize("signed", [True, False])
def test_every_number_of_the_codebook_is_its_own_nearest_and_ties_go_down(signed):
    code = dynamic_map(signed=signed)
    assert code.dtype == np.float32
    assert np.all(np.diff(code) > 0)
    assert (code[0], code[-1]) == (pytest.approx(-0.99296875) if signed else 0, 1)
    np.testing.assert_array_equal(nearest_code(jnp.asarray(code), signed=signed), np.arange(256))
    np.testing.assert_array_equal(nearest_code(jnp.array([-2.0, 2.0]), signed=signed), [0, 255])
    # Half-way between neighbours, rounded to float32: what was rounded up is nearer to the upper one.
    exact = (code[:-1].astype(np.float64) + code[1:]) / 2
    middles = exact.astype(np.float32)
    assert min(np.sum(middles > exact), np.sum(middles == exact), np.sum(middles < exact)) > 10
    lower = np.arange(255)
    np.testing.assert_array_equal(nearest_code(jnp.asarray(middles), signed=signed), lower + (middles > exact))
    above = np.nextafter(middles, np.float32(2))
    np.testing.assert_array_equal(nearest_code(jnp.asarray(above), signed=signed), lower + 1)


def test_a_block_has_its_own_scale_and_zeros_stay_zeros():
    values = np.concatenate([np.full(256, 1e-20), np.full(256, 1e20), np.zeros(256), [3.0]]).astype(np.float32)
    moment = quantize(jnp.asarray(values), signed=True)
    np.testing.assert_array_equal(moment.absmax, values[[0, 256, 512, 768]])
    np.testing.assert_array_equal(dequantize(moment, signed=True), values)


def test_blocks_end_with_a_layer():
    """Each layer of a stack steps as it would alone, though 5,000 is no multiple of 256."""
    grads = jax.random.normal(jax.random.key(0), (3, 50, 100)) * jnp.array([1e-3, 1.0, 1e3])[:, None, None]
    tx = make()

    def three_steps(params, grads):
        state = tx.init(params)
        for factor in (1.0, -0.5, 0.1):
            updates, state = tx.update(jax.tree.map(lambda g: factor * g, grads), state, params)  # noqa: B023
        return updates, state

    stacked, state = three_steps({"layers": {"lora_A": jnp.zeros((3, 50, 100))}}, {"layers": {"lora_A": grads}})
    for i in range(3):
        alone, one = three_steps({"lora_A": jnp.zeros((50, 100))}, {"lora_A": grads[i]})
        np.testing.assert_allclose(stacked["layers"]["lora_A"][i], alone["lora_A"], rtol=1e-5)
        for ours, theirs in zip(moments(state), moments(one), strict=True):
            np.testing.assert_allclose(ours["layers"]["lora_A"].absmax[i], theirs["lora_A"].absmax, rtol=1e-6)
            np.testing.assert_array_equal(ours["layers"]["lora_A"].codes[i], theirs["lora_A"].codes)


def test_small_tensors_and_the_embedding_keep_32_bits():
    def zeros(*shape):
        return jnp.zeros(shape)

    params = {
        "model": {
            "embed_tokens": {"weight": zeros(100, 64)},
            "layers": {"norm": {"weight": zeros(8, 1024)}, "o_proj": {"weight": zeros(2, 64, 64)}},
        },
        "lora": {
            "adapters": {
                # 4,095 numbers in a layer, though 8,190 in all.
                "model": {"layers": {"lora_B": zeros(2, 4095, 1)}, "embed_tokens": {"lora_A": zeros(8, 1000)}}
            },
            "saved": {"model.embed_tokens": zeros(100, 64), "lm_head": zeros(100, 64)},
        },
    }
    for moment in moments(make().init(params)):
        quantized = jax.tree.map(
            lambda m: isinstance(m, QuantizedMoment), moment, is_leaf=lambda m: isinstance(m, QuantizedMoment)
        )
        assert quantized["model"] == {
            "embed_tokens": {"weight": False},
            "layers": {"norm": {"weight": False}, "o_proj": {"weight": True}},
        }
        assert quantized["lora"]["adapters"]["model"] == {
            "layers": {"lora_B": False},
            "embed_tokens": {"lora_A": True},
        }
        assert quantized["lora"]["saved"] == {"model.embed_tokens": False, "lm_head": True}


@pytest.mark.optimized
def test_the_state_takes_2_bytes_a_parameter_and_a_step_little_more():
    params = {"layers": {"lora_A": jnp.zeros((16, 16, 3072)), "lora_B": jnp.zeros((16, 9216, 16))}}
    numbers = sum(x.size for x in jax.tree.leaves(params))
    tx = make()
    state = jax.eval_shape(tx.init, params)
    assert sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state)) < 2.04 * numbers
    # 6.8 bytes were seen: the new state, the updates, and the float32 moments of one layer.
    step = jax.jit(tx.update, donate_argnums=(0, 1)).lower(params, state, params).compile()
    assert step.memory_analysis().temp_size_in_bytes < 8 * numbers


def test_a_checkpoint_brings_the_state_back(tmp_path):
    params = {"layers": {"lora_A": jnp.ones((2, 8, 600)), "lora_B": jnp.ones((2, 4))}}
    tx = make()
    fresh = TrainState.create(params, tx, jax.random.key(0))
    grads = jax.tree.map(lambda p: jax.random.normal(jax.random.key(1), p.shape), params)
    _, opt_state = tx.update(grads, fresh.opt_state, params)
    saved = replace(fresh, trainable=params, opt_state=opt_state)
    checkpoints = Checkpoints(tmp_path, None)
    checkpoints.save(1, saved, {}, None)
    restored, _ = checkpoints.restore(fresh)
    checkpoints.close()
    assert jax.tree.structure(restored.opt_state) == jax.tree.structure(opt_state)
    assert np.ptp(moments(restored.opt_state)[0]["layers"]["lora_A"].codes) > 200
    for ours, theirs in zip(jax.tree.leaves(restored.opt_state), jax.tree.leaves(opt_state), strict=True):
        assert ours.dtype == theirs.dtype
        np.testing.assert_array_equal(ours, theirs)


def test_bias_correction_keeps_its_digits():
    for step in (1, 2, 1000):
        np.testing.assert_allclose(bias_correction(0.999, jnp.asarray(step)), 1 - 0.999**step, rtol=5e-7)
    assert bias_correction(0.0, jnp.asarray(1)) == 1
