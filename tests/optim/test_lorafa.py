"""LoRA-FA: A stays as it is, and B moves where the whole weight would."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from phi3_jax.config.training import TrainingSection
from phi3_jax.lora import partition, trainable_mask
from phi3_jax.lora.adapters import LoraEmbedding, LoraLinear
from phi3_jax.optim.optimizer import make_optimizer
from phi3_jax.optim.schedule import make_schedule
from phi3_jax.peft.adapter import load_adapter
from phi3_jax.system.errors import InputError
from phi3_jax.training.loop import Trainer, load_job
from tests.helpers.models import random_lora, tiny_model
from tests.helpers.runs import run_config, write_inputs

NO_BASE = nnx.State({})


def test_lora_fa_freezes_a_of_linear_layers():
    leaf = jnp.zeros((2, 3, 3))
    pair = {"lora_A": leaf, "lora_B": leaf, "magnitude": leaf}
    lora = {"model": {"layers": {"qkv_proj": pair}, "embed_tokens": pair}}
    mask = trainable_mask(NO_BASE, lora, freeze_A=True)["lora"]["model"]
    assert mask["layers"]["qkv_proj"] == {"lora_A": False, "lora_B": True, "magnitude": True}
    assert mask["embed_tokens"] == {"lora_A": True, "lora_B": True, "magnitude": True}


def lora_fa(frozen, **training):
    section = TrainingSection(
        **{"optim": "lorafa", "learning_rate": 0.1, "lr_scheduler_type": "constant", "max_grad_norm": 0.0, **training}
    )
    return make_optimizer(section, make_schedule(section, 10), frozen)


def test_lora_fa_brings_the_weight_nearest_to_its_own_gradient():
    """s G' A is the projection of ∂L/∂W on A's rows, whatever the scale: the first moment shows G'."""
    rng = np.random.default_rng(0)
    a, b, grad_w = (rng.normal(size=shape).astype(np.float32) for shape in [(2, 4, 9), (2, 7, 4), (2, 7, 9)])
    lora = {"layers": {"o_proj": LoraLinear(jnp.asarray(a), jnp.asarray(b), 0.5)}}
    trainable, frozen = partition(lora, trainable_mask(NO_BASE, lora, freeze_A=True)["lora"])
    tx = lora_fa(frozen)
    state = tx.init({"lora": trainable})
    grads = {"layers": {"o_proj": LoraLinear(None, jnp.asarray(0.5 * grad_w @ a.mT), 0.5)}}
    _, state = tx.update({"lora": grads}, state, {"lora": trainable})
    projected = state[1].mu["lora"]["layers"]["o_proj"].lora_B / 0.1
    nearest = np.stack([g @ np.linalg.pinv(x) @ x for g, x in zip(grad_w, a, strict=True)])
    np.testing.assert_allclose(0.5 * projected @ a, nearest, atol=1e-5)
    assert state[1].mu["lora"]["layers"]["o_proj"].lora_A is None


def test_lora_fa_decays_after_the_step_and_everything():
    a = jnp.ones((2, 1, 4))
    lora = {"layers": {"o_proj": LoraLinear(a, jnp.ones((2, 3, 1)), 1.0, lora_bias=jnp.ones((2, 3)))}}
    trainable, frozen = partition(lora, trainable_mask(NO_BASE, lora, freeze_A=True)["lora"])
    tx = lora_fa(frozen, weight_decay=0.5)
    updates, _ = tx.update({"lora": trainable}, tx.init({"lora": trainable}), {"lora": trainable})
    # Adam's first step is the learning rate, 0.1: from 1 to 0.9, of which 0.1 · 0.5 decays.
    for leaf in jax.tree.leaves(updates):
        np.testing.assert_allclose(leaf, 0.9 * (1 - 0.05) - 1, rtol=1e-5)


def test_lora_fa_trains_an_embedding_adapter_whole():
    lora = {
        "layers": {"o_proj": LoraLinear(jnp.ones((2, 1, 4)), jnp.ones((2, 3, 1)), 1.0)},
        "embed_tokens": LoraEmbedding(jnp.zeros((2, 9)), jnp.ones((4, 2)), 1.0),
    }
    trainable, frozen = partition(lora, trainable_mask(NO_BASE, lora, freeze_A=True)["lora"])
    tx = lora_fa(frozen)
    state = tx.init({"lora": trainable})
    assert list(state[1].inverses) == ["lora.layers.o_proj.lora_B"]
    grads = jax.tree.map(jnp.ones_like, {"lora": trainable})
    updates, _ = tx.update(grads, state, {"lora": trainable})
    np.testing.assert_allclose(updates["lora"]["embed_tokens"].lora_A, -0.1, rtol=1e-5)


def test_lora_fa_finds_the_adapters_of_a_model():
    lora = random_lora(tiny_model())
    _, frozen = partition(lora, trainable_mask(NO_BASE, lora, freeze_A=True)["lora"])
    for part in (frozen, lora):
        tx = lora_fa(part)
        inverses = tx.init({"lora": lora})[1].inverses
        assert {name: x.shape for name, x in inverses.items()} == {
            f"lora.adapters.model.layers.{name}.lora_B": (2, 4, 4)
            for name in ("mlp.down_proj", "mlp.gate_up_proj", "self_attn.o_proj", "self_attn.qkv_proj")
        }


def test_lora_fa_without_a_frozen_a_is_an_error():
    for lora in (None, {"embed_tokens": LoraEmbedding(jnp.zeros((2, 9)), jnp.ones((4, 2)), 1.0)}):
        with pytest.raises(InputError, match="training.optim is lorafa, but no adapter of a linear layer"):
            lora_fa(lora)


def test_a_run_with_lora_fa_trains_b_alone(tmp_path):
    write_inputs(tmp_path)
    run = run_config(tmp_path, training={"optim": "lorafa", "max_steps": 2, "save_steps": 2, "eval_strategy": "no"})
    job = load_job(run)
    start = dict(job.frozen["lora"].items())
    assert {shape for row in job.table.rows for shape in row.shapes} == {"lora_B"}
    trainer = Trainer(run, job)
    try:
        trainer.begin()
        trainer.loop()
        trainer.finish()
        stepped = trainer.state
        restored, _ = trainer.files.checkpoints.restore(stepped)
    finally:
        trainer.close()
    trained = load_adapter(tmp_path / "out" / "adapter", job.model_and_lora(stepped.trainable)[0])
    for name, adapter in trained.items():
        np.testing.assert_array_equal(adapter.lora_A, start[name].lora_A)
        assert np.abs(adapter.lora_B).max() > 1e-3
    for ours, saved in zip(jax.tree.leaves(stepped.opt_state), jax.tree.leaves(restored.opt_state), strict=True):
        np.testing.assert_array_equal(ours, saved)
