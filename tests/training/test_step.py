"""The step: what it averages over, what it changes, and what it leaves alone."""

import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from phi3_jax.config.training import TrainingSection
from phi3_jax.objectives.next_token import loss
from tests.helpers.models import random_lora, tiny_model
from tests.helpers.rows import accumulated, random_rows
from tests.helpers.runs import start

SETTINGS = {"learning_rate": 1e-2, "warmup_ratio": 0.0, "lr_scheduler_type": "constant"}


def stepped(accumulation, rows, steps=1, model=None, **settings):
    model = model or tiny_model()
    training = TrainingSection(**{**SETTINGS, **settings})
    state, frozen, step = start(model, random_lora(model, lora_dropout=settings.pop("dropout", 0.0)), training)
    for _ in range(steps):
        state = step(state, frozen, accumulated(rows, accumulation))
    return state


@pytest.mark.parametrize("lengths", [[16, 3, 9, 12], [16, 16, 5, 0]], ids=["uneven", "partial last batch"])
def test_accumulation_is_the_mean_over_all_target_tokens(lengths):
    rows = random_rows(lengths, 16)
    # Plain descent: AdamW would hide a wrong scale of the gradient.
    at_once, in_parts = (stepped(n, rows, optim="sgd", max_grad_norm=0.0) for n in (1, 4))
    np.testing.assert_allclose(in_parts.window.loss, at_once.window.loss, rtol=1e-6)
    assert in_parts.window.target_tokens == at_once.window.target_tokens == rows["loss_mask"].sum()
    assert in_parts.window.tokens == sum(lengths)
    assert in_parts.window.attended == sum(n * (n + 1) // 2 for n in lengths)
    for a, b in zip(jax.tree.leaves(in_parts.trainable), jax.tree.leaves(at_once.trainable), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("dtype", "config"),
    [
        ("float32", {}),
        # Parameters that the layers are given as they are, beside others that the layers' are made of.
        ("float32", {"rank_pattern": {"layers.1.mlp.down_proj": 2, "layers.0.self_attn.o_proj": 3}}),
        ("bfloat16", {"target_modules": ["qkv_proj", "down_proj"], "modules_to_save": ["o_proj", "lm_head"]}),
    ],
    ids=["plain", "by layer", "saved"],
)
def test_the_gradient_is_that_of_the_mean_loss(dtype, config):
    model, rows = tiny_model(dtype=jnp.dtype(dtype)), random_rows([16, 3, 9, 12], 16)
    lora = random_lora(model, **config)
    grads = jax.jit(jax.grad(lambda lora: loss(model, lora, rows)))(lora)
    state, frozen, step = start(model, lora, TrainingSection(**SETTINGS, optim="sgd", max_grad_norm=0.0))
    state = step(state, frozen, accumulated(rows, 4))
    # The step's sum of four parts; in bfloat16 each part is rounded by itself.
    tolerance = 2e-5 if dtype == "float32" else 2e-2
    np.testing.assert_allclose(state.window.grad_norm, optax.tree.norm(grads), rtol=tolerance)
    expected = jax.tree.map(lambda p, g: p - 1e-2 * g, lora, grads)
    for a, b, g in zip(*map(jax.tree.leaves, (state.trainable["lora"], expected, grads)), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-7 + 1e-2 * tolerance * float(jnp.max(jnp.abs(g))))


def test_the_base_is_frozen_and_has_no_optimizer_state():
    model, rows = tiny_model(dtype=jnp.bfloat16), random_rows([16, 3, 9, 12], 16)
    lora = random_lora(model)
    state, frozen, step = start(model, lora, TrainingSection(**SETTINGS, weight_decay=0.1))
    before = jax.tree.map(np.array, frozen)
    assert {x.dtype for x in jax.tree.leaves(frozen)} == {jnp.dtype(jnp.bfloat16)}
    assert {x.dtype for x in jax.tree.leaves(state.trainable)} == {jnp.dtype(jnp.float32)}
    first = jax.tree.leaves(state.trainable)
    for _ in range(3):
        state = step(state, frozen, accumulated(rows, 2))
    for a, b in zip(jax.tree.leaves(frozen), jax.tree.leaves(before), strict=True):
        assert not a.is_deleted()
        assert (np.asarray(a) == b).all()
    assert all(x.is_deleted() for x in first)  # donated
    adapter = sum(x.size for x in jax.tree.leaves(lora))
    moments = [x for x in jax.tree.leaves(state.opt_state) if x.ndim]
    assert sum(x.size for x in moments) == 2 * adapter
    assert sum(x.size for x in jax.tree.leaves(state.trainable)) == adapter
    assert all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(state.trainable))


def test_full_finetuning_trains_everything_in_float32():
    model = tiny_model(dtype=jnp.float32)
    rows = random_rows([16, 16], 16)
    rows["loss_mask"][:, 1:] = 1
    training = TrainingSection(**{**SETTINGS, "learning_rate": 1e-5}, optim="sgd", max_grad_norm=0.0)
    state, frozen, step = start(model, None, training, dtype=jnp.bfloat16)
    assert jax.tree.leaves(frozen) == []
    before = jax.tree.map(np.array, state.trainable)
    state = step(state, frozen, accumulated(rows, 1))
    changed = [
        not (np.asarray(a) == b).all()
        for a, b in zip(jax.tree.leaves(state.trainable), jax.tree.leaves(before), strict=True)
    ]
    # Updates this small, far below bfloat16's spacing, would be lost in bfloat16 weights.
    assert all(changed)
    assert {x.dtype for x in jax.tree.leaves(state.trainable)} == {jnp.dtype(jnp.float32)}


def test_dropout_differs_by_step_and_micro_batch_and_repeats_with_the_seed():
    rows = random_rows([16, 16], 16)
    rows = {name: np.concatenate([x[:1], x[:1]]) for name, x in rows.items()}  # the same row twice

    def losses(seed, learning_rate=0.0, steps=2, accumulation=2):
        model = tiny_model()
        training = TrainingSection(**{**SETTINGS, "learning_rate": learning_rate}, seed=seed)
        state, frozen, step = start(model, random_lora(model, lora_dropout=0.5), training)
        sums = [0.0]
        for _ in range(steps):
            state = step(state, frozen, accumulated(rows, accumulation))
            sums.append(float(state.window.loss))
        return np.diff(sums)

    first, second = losses(seed=0)
    assert first != second
    np.testing.assert_array_equal(losses(seed=0), [first, second])
    assert losses(seed=1)[0] != first
    once = {name: x[:1] for name, x in rows.items()}
    model = tiny_model()
    state, frozen, step = start(model, random_lora(model, lora_dropout=0.5), TrainingSection(**SETTINGS))
    alone = float(step(state, frozen, accumulated(once, 1)).window.loss)
    assert abs(first - 2 * alone) > 1e-4  # two micro-batches do not share one mask


def test_rematerialisation_changes_nothing():
    rows = random_rows([16, 3, 9, 12], 16)
    plain, remat = (stepped(2, rows, gradient_checkpointing=on) for on in (False, True))
    np.testing.assert_allclose(plain.window.grad_norm, remat.window.grad_norm, rtol=1e-5)


def test_one_compilation_a_shape():
    model = tiny_model()
    state, frozen, step = start(model, random_lora(model), TrainingSection(**SETTINGS))
    for width in (16, 16, 8, 16, 8):
        state = step(state, frozen, accumulated(random_rows([5, 8], width), 1))
    assert step.compilations == 2


@pytest.mark.slow
def test_compile_time_does_not_grow_with_depth():
    def seconds(layers):
        model = tiny_model(layers)
        state, frozen, step = start(model, random_lora(model), TrainingSection(**SETTINGS))
        batch = accumulated(random_rows([16, 16], 16), 2)
        began = time.process_time()  # of this process, whatever else the machine does
        step.compile(state, frozen, batch)
        return time.process_time() - began

    seconds(2)  # what is loaded and traced once for all
    shallow, deep = (min(seconds(layers) for _ in range(3)) for layers in (4, 32))
    assert deep <= 1.3 * shallow


def test_it_learns_a_few_rows_by_heart():
    rows = random_rows([16, 16], 16)
    rows["loss_mask"][:, 1:] = 1
    model = tiny_model()
    state, frozen, step = start(model, random_lora(model, r=8), TrainingSection(**SETTINGS))
    batch = accumulated(rows, 1)
    sums = [0.0]
    for _ in range(150):
        state = step(state, frozen, batch)
        sums.append(float(state.window.loss))
    per_token = np.diff(sums) / rows["loss_mask"].sum()
    assert per_token[0] > 3  # about ln 53
    assert per_token[-1] < 0.3
