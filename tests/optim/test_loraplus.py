"""LoRA+: which parameters learn faster, and at what rate."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from phi3_jax.config.training import TrainingSection
from phi3_jax.lora import trainable_mask
from phi3_jax.optim.optimizer import make_optimizer
from phi3_jax.optim.schedule import make_schedule
from tests.helpers.optimizers import flat, tree

NO_BASE = nnx.State({})


FAST = "o_proj.lora_B o_proj.lora_bias down_proj.lora.lora_B down_proj.magnitude saved.model.norm"


def test_lora_plus_learns_b_and_vectors_faster_and_embeddings_at_their_own_rate():
    training = TrainingSection(
        optim="sgd",
        learning_rate=0.01,
        lr_scheduler_type="linear",
        warmup_ratio=0.0,
        max_grad_norm=0.0,
        weight_decay=0.5,
        loraplus_lr_ratio=8.0,
        loraplus_lr_embedding=3e-4,
    )
    tx = make_optimizer(training, make_schedule(training, 10))
    params = tree()
    state = tx.init(params)
    _, state = tx.update(params, state, params)
    updates, _ = tx.update(params, state, params)  # the second step, at 9/10 of the peak
    for name, update in flat(updates).items():
        embedding = "embed_tokens.lora_" in name
        rate = 3e-4 if embedding else 0.08 if name.endswith(tuple(FAST.split())) else 0.01
        decay = 0.0 if name.endswith("lora_bias") else 0.5
        np.testing.assert_allclose(update, -0.9 * rate * (1 + decay), rtol=1e-5, err_msg=name)


def test_without_lora_plus_norms_and_biases_do_not_decay_and_all_learn_alike():
    training = TrainingSection(
        optim="sgd", learning_rate=0.01, lr_scheduler_type="constant", max_grad_norm=0.0, weight_decay=0.5
    )
    tx = make_optimizer(training, make_schedule(training, 10))
    updates, _ = tx.update(tree(), tx.init(tree()), tree())
    for name, update in flat(updates).items():
        decay = 0.0 if name.endswith(("lora_bias", "norm")) else 0.5
        np.testing.assert_allclose(update, -0.01 * (1 + decay), rtol=1e-6, err_msg=name)


@pytest.mark.parametrize("optim", ["adamw", "adamw_8bit", "lion", "adafactor"])
def test_lora_plus_goes_with_every_optimizer(optim):
    rates = []
    for ratio in (None, 16.0):
        training = TrainingSection(
            optim=optim, learning_rate=0.01, lr_scheduler_type="constant", max_grad_norm=0.0, loraplus_lr_ratio=ratio
        )
        tx = make_optimizer(training, make_schedule(training, 10))
        params = {"layers": {"o_proj": {"lora_A": jnp.ones((2, 4, 6)), "lora_B": jnp.ones((2, 6, 4))}}}
        updates, _ = tx.update(params, tx.init(params), params)
        rates.append(updates["layers"]["o_proj"])
    np.testing.assert_allclose(rates[1]["lora_A"], rates[0]["lora_A"], rtol=1e-6)
    np.testing.assert_allclose(rates[1]["lora_B"], 16 * rates[0]["lora_B"], rtol=1e-6)


def test_constants_of_a_start_never_train():
    leaf = jnp.zeros((2, 3, 3))
    lora = {"lora": {"lora_A": leaf, "lora_B": leaf, "magnitude": leaf}, "start_A": leaf, "start_B": leaf}
    mask = trainable_mask(NO_BASE, lora)["lora"]
    assert mask == {"lora": {"lora_A": True, "lora_B": True, "magnitude": True}, "start_A": False, "start_B": False}
