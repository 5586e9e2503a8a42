"""Long rows, a piece of the sequence at a time."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from phi3_jax import InputError
from phi3_jax.model.sequence import in_pieces, piece_count
from phi3_jax.objectives.next_token import loss
from phi3_jax.quant import quantize_model
from tests.helpers.models import quantizable_model, random_lora, tiny_model


@pytest.mark.parametrize(
    ("wanted", "length", "pieces"),
    [
        ("auto", 16384, 1),
        ("auto", 24576, 3),
        ("auto", 131072, 16),
        ("auto", 131071, 1),
        ("none", 131072, 1),
        (6, 64, 2),
    ],
)
def test_how_many_pieces_a_row_is_cut_into(wanted, length, pieces):
    assert piece_count(wanted, length) == pieces


@pytest.mark.parametrize("wanted", ["all", 0, -4])
def test_no_number_of_pieces(wanted):
    with pytest.raises(InputError, match=f"chunk_mlp is {wanted!r}, expected auto, none or a number of pieces from 1"):
        piece_count(wanted, 64)


def test_gradients_in_pieces_are_those_of_the_whole():
    """Of what is cut, wherever the results have the sequence; of what every piece is given; of nothing else."""
    x, w, scale = (jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate([(2, 12, 3), (3, 4), (12,)]))
    given = {"w": w, "count": jnp.arange(3), "frozen": jnp.ones(4)}

    def work(whole, cut):
        y = jnp.tanh(cut[0] @ whole["w"]) * whole["frozen"] * cut[1][..., None]
        return y, y.swapaxes(1, 2)

    def total(x, w, pieces):
        whole, cut = {**given, "w": w}, (x, jnp.broadcast_to(scale, (2, 12)))
        first, second = in_pieces(work, pieces, whole, cut, (1, 2))
        return jnp.sum(jnp.sin(first)) + jnp.sum(second[:, 0] ** 3)

    gradients = jax.jit(jax.value_and_grad(total, (0, 1)), static_argnums=2)
    expected, found = gradients(x, w, 1), gradients(x, w, 3)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), found, expected)


def batch():
    ids = jax.random.randint(jax.random.key(1), (2, 32), 1, 48)
    return {"input_ids": ids, "segment_ids": jnp.where(jnp.arange(32) < 20, 1, 2)[None].repeat(2, 0)}


def gradients(model, lora, pieces, **options):
    def value(lora):
        return loss(model, lora, batch(), remat="full", chunk_mlp=pieces, **options)

    return jax.jit(jax.value_and_grad(value))(lora)


@pytest.mark.parametrize("quantization", [pytest.param(None, marks=pytest.mark.slow), "nf4"])
def test_a_model_in_pieces_has_the_same_loss_and_gradients(quantization):
    """With dropout, whose mask is the same."""
    model = quantizable_model(initializer_range=0.05, resid_pdrop=0.1)
    fresh = random_lora(model, target_modules="all-linear", use_dora=not quantization, lora_dropout=0.1)
    lora = jax.tree.map(lambda x: 0.3 * x, fresh)
    model = model if quantization is None else quantize_model(model, quantization)
    key = jax.random.key(5)
    (found, grads), (expected, whole) = (gradients(model, lora, n, dropout_key=key) for n in (4, "none"))
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    for ours, theirs in zip(jax.tree.leaves(grads), jax.tree.leaves(whole), strict=True):
        # DoRA divides by norms, so that the order of sums shows a little more.
        tolerance = 1e-6 if quantization else 3e-6
        np.testing.assert_allclose(ours, theirs, atol=tolerance * np.abs(theirs).max(), rtol=0)


def test_pieces_need_less_memory():
    """No array of the MLP's width has a whole row."""
    model = tiny_model(intermediate_size=1024)
    lora = random_lora(model, target_modules="all-linear")

    def program(pieces):
        return jax.jit(jax.grad(lambda lora: loss(model, lora, batch(), remat="full", chunk_mlp=pieces))).lower(lora)

    assert "2x32x2048" in program("none").as_text()
    cut = program(8).as_text()
    assert "2x32x2048" not in cut
    assert "2x4x2048" in cut
