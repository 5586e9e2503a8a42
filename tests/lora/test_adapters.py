import jax
import jax.numpy as jnp
import numpy as np
import pytest

from phi3_jax.lora import Lora, LoraLinear


def test_dropout_acts_on_the_input_of_the_adapter_alone():
    # With A and B the identity, the update is what dropout left of the input.
    x = jax.random.normal(jax.random.key(0), (50, 40)) + 3
    adapter = LoraLinear(jnp.eye(40), jnp.eye(40), scaling=2.0, dropout=0.25)
    y = jnp.ones_like(x)
    update = np.asarray(adapter(y, x, None, jax.random.key(1)) - y) / 2
    kept = update != 0
    np.testing.assert_allclose(update[kept], np.asarray(x / 0.75)[kept], rtol=1e-5)
    assert kept.mean() == pytest.approx(0.75, abs=0.03)  # three standard deviations of 2,000 draws
    np.testing.assert_allclose(adapter(y, x, None), y + 2 * x, rtol=1e-6)  # no key: no dropout


def test_every_layer_and_module_drops_its_own(tiny, random_lora):
    model = tiny()
    ids = jnp.arange(1, 13)[None]
    plain = random_lora(model, target_modules=["o_proj"])
    lora = random_lora(model, target_modules=["o_proj"], lora_dropout=0.5)
    base = model(ids, lora=plain)
    np.testing.assert_array_equal(model(ids, lora=lora), base)  # evaluation
    first, again, other = (model(ids, lora=lora, dropout_key=jax.random.key(seed)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert np.any(first != other)
    assert np.any(first != base)


def test_update_of_a_bfloat16_layer_is_as_near_the_truth_as_its_type_allows():
    keys = jax.random.split(jax.random.key(0), 4)
    x, y = (jax.random.normal(key, (64, 256)) for key in keys[:2])
    a, b = jax.random.normal(keys[2], (8, 256)) / 16, jax.random.normal(keys[3], (256, 8)) / 8
    x, y = x.astype(jnp.bfloat16), y.astype(jnp.bfloat16)
    truth = y.astype(jnp.float32) + 2.0 * (x.astype(jnp.float32) @ a.T) @ b.T
    out = LoraLinear(a, b, scaling=2.0)(y, x, None)
    assert out.dtype == jnp.bfloat16
    # A, B, the product in between and the result are rounded to 8 bits, each at most 2⁻⁹ off: together two
    # to three units of the rounding that the result has in any case.
    rounding = np.linalg.norm(np.float32(truth.astype(jnp.bfloat16)) - truth)
    assert np.linalg.norm(np.float32(out) - truth) < 3 * rounding


def test_dropouts_scale_is_not_rounded_to_the_layers_type():
    """1 / 0.9; in bfloat16 it would be 1.109375, and every update 0.16% too small."""
    x = jax.random.normal(jax.random.key(1), (1000, 20)).astype(jnp.bfloat16)
    adapter = LoraLinear(jnp.eye(20), jnp.eye(20), scaling=1.0, dropout=0.1)
    out = adapter(jnp.zeros((1000, 20)), x, None, jax.random.key(0))
    wide = jnp.where(out != 0, x.astype(jnp.float32), 0)
    np.testing.assert_allclose(jnp.sum(out * wide) / jnp.sum(wide * wide), 1 / 0.9, rtol=1e-4)


def test_embedding_padding_column_gets_no_gradient_as_in_peft(tiny, random_lora):
    model = tiny(pad_token_id=4)
    lora = random_lora(model, target_modules=["embed_tokens"])
    ids = jnp.array([[4, 1, 2, 4]])

    def total(lora: Lora) -> jax.Array:
        return jnp.sum(model.embed(ids, lora) ** 2)

    ((_, grad),) = jax.grad(total)(lora).items()
    used = np.flatnonzero(np.any(grad.lora_A, axis=0))
    assert used.tolist() == [1, 2]
    # B learns from the padding too (PyTorch's padding_idx stops the table's gradient alone).
    ((_, without),) = jax.grad(lambda lora: jnp.sum(model.embed(ids[:, 1:3], lora) ** 2))(lora).items()
    assert np.abs(grad.lora_B - without.lora_B).max() > 0.1


def test_gradients_exist_for_the_adapter_alone(tiny, random_lora):
    model = tiny()
    lora = random_lora(model, target_modules="all-linear")
    grads = jax.grad(lambda lora: jnp.mean(model(jnp.array([[1, 2, 3]]), lora=lora) ** 2))(lora)
    assert jax.tree.structure(grads) == jax.tree.structure(lora)
    assert all(np.any(leaf) for leaf in jax.tree.leaves(grads))
