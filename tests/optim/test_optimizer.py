"""Clipping and weight decay, against their formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from phi3_jax.config.training import TrainingSection
from phi3_jax.optim.optimizer import clip_by_global_norm, decays, make_optimizer
from phi3_jax.optim.schedule import make_schedule
from tests.helpers.models import tiny_model


def test_clipping():
    grads = {"a": jnp.array([3.0]), "b": jnp.array([[4.0]])}  # norm 5
    clipped, _ = clip_by_global_norm(1.0).update(grads, ())
    np.testing.assert_allclose(clipped["b"][0, 0], 4 / (5 + 1e-6), rtol=1e-7)
    untouched, _ = clip_by_global_norm(10.0).update(grads, ())
    assert untouched["a"] == 3.0


def step_of(training: TrainingSection, params, grads):
    tx = make_optimizer(training, make_schedule(training, 10))
    updates, _ = tx.update(grads, tx.init(params), params)
    return updates


def test_max_grad_norm_0_is_off():
    params = {"lora_A": jnp.zeros(2)}
    training = TrainingSection(optim="sgd", learning_rate=1.0, lr_scheduler_type="constant", max_grad_norm=0.0)
    np.testing.assert_array_equal(
        step_of(training, params, {"lora_A": jnp.array([300.0, 400.0])})["lora_A"], [-300, -400]
    )


def test_norms_and_biases_do_not_decay():
    state = nnx.split(tiny_model())[1]
    kept = {jax.tree_util.keystr(path, simple=True, separator="."): d for path, d in leaves(decays({"model": state}))}
    undecayed = {name for name, decayed in kept.items() if not decayed}
    assert len(undecayed) == 3  # two in each layer, and the last
    assert all("norm" in name for name in undecayed)
    assert decays({"lora_A": 0, "lora_B": 0, "bias": 0}) == {"lora_A": True, "lora_B": True, "bias": False}


def leaves(tree):
    return jax.tree_util.tree_leaves_with_path(tree)


@pytest.mark.parametrize("optim", ["adamw", "adamw_8bit", "adafactor", "lion", "sgd"])
def test_weight_decay_is_decoupled(optim):
    training = TrainingSection(
        optim=optim, learning_rate=0.1, lr_scheduler_type="constant", weight_decay=0.5, max_grad_norm=1.0
    )
    params = {"lora_A": jnp.array([2.0]), "norm": jnp.array([2.0])}
    grads = jax.tree.map(jnp.zeros_like, params)
    updates = step_of(training, params, grads)
    np.testing.assert_allclose(updates["lora_A"], [-0.1 * 0.5 * 2.0], rtol=1e-6)
    assert updates["norm"] == 0


@pytest.mark.parametrize("optim", ["adamw", "adamw_8bit", "adafactor", "lion", "sgd"])
def test_every_optimizer_descends(optim):
    training = TrainingSection(optim=optim, learning_rate=0.05, lr_scheduler_type="constant", max_grad_norm=0.0)
    tx = make_optimizer(training, make_schedule(training, 100))
    params = {"lora_A": jnp.array([[1.0, -2.0], [0.5, 3.0]])}
    state = tx.init(params)
    for _ in range(50):
        updates, state = tx.update(params, state, params)  # the gradient of |x|² / 2
        params = jax.tree.map(jnp.add, params, updates)
    assert float(jnp.abs(params["lora_A"]).max()) < 1.5  # half of where it started
