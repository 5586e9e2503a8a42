"""What the compiled step keeps, computes and moves: read from the program, not timed.

Buffers are assigned and operations counted before the optimizations that tests leave out: both give the same figures.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from phi3_jax.config.training import TrainingSection
from phi3_jax.model.remat import POLICIES
from tests.helpers.models import VOCAB, random_lora, tiny_model
from tests.helpers.rows import accumulated, random_rows
from tests.helpers.runs import start

# Wide and shallow: what is kept for the backward pass stands out against one layer's working memory.
WIDE = {"hidden_size": 64, "intermediate_size": 256, "head_dim": 16}


def compiled(length=256, accumulation=1, layers=4, dtype=jnp.float32, rank=4, full=False, **settings):
    model = tiny_model(layers, dtype, **WIDE)
    lora = None if full else random_lora(model, r=rank)
    state, frozen, step = start(model, lora, TrainingSection(**settings))
    batch = accumulated(random_rows([length] * accumulation, length), accumulation)
    step.compile(state, frozen, batch)
    return next(iter(step._compiled.values()))


def temporaries(**settings):
    return compiled(**settings).memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("dtype", [pytest.param(jnp.float32, marks=pytest.mark.slow), jnp.bfloat16])
def test_gradients_are_the_same_under_every_policy(dtype):
    rows = random_rows([16, 9], 16)

    def trained(policy):
        model = tiny_model(dtype=dtype)
        training = TrainingSection(remat_policy=policy, optim="sgd", max_grad_norm=0.0, warmup_ratio=0.0)
        state, frozen, step = start(model, random_lora(model), training)
        return jax.tree.leaves(step(state, frozen, accumulated(rows, 1)).trainable)

    # What is computed twice is the same both times, to the last bit or nearly: fusions differ.
    tolerance = 1e-6 if dtype == jnp.float32 else 1e-3
    reference = trained("none")
    for policy in set(POLICIES) - {"none"}:
        for one, other in zip(trained(policy), reference, strict=True):
            np.testing.assert_allclose(one, other, rtol=0, atol=tolerance * float(jnp.max(jnp.abs(other))))


@pytest.mark.parametrize("dtype", [pytest.param(jnp.float32, marks=pytest.mark.slow), jnp.bfloat16])
def test_policies_keep_what_they_say(dtype):
    """Bytes a token and layer beyond those of `full`, of the width in numbers of the type."""
    length, layers, size = 256, 8, jnp.dtype(dtype).itemsize
    base, attention, dots = (
        temporaries(remat_policy=name, length=length, layers=layers, dtype=dtype) / (length * layers * size)
        for name in ("full", "attention", "dots")
    )
    # attention's output of 4 heads of 16, and their softmax sums in float32
    assert attention - base == pytest.approx(64 + 4 * 4 / size, rel=0.3)
    # and q, k, v (4 and twice 2 heads), o, gate, up, down
    assert dots - attention == pytest.approx(128 + 64 + 2 * 256 + 64, rel=0.3)


def test_accumulation_has_one_buffer_for_the_gradients():
    """The gradients of large adapters, with one micro-batch and with four: no more of them."""
    adapters = sum(x.size * 4 for x in jax.tree.leaves(random_lora(tiny_model(4, **WIDE), r=128)))
    one, four = (temporaries(accumulation=n, rank=128, length=16) for n in (1, 4))
    assert four < one + 0.1 * adapters


def test_the_loss_does_not_grow_with_length_times_vocabulary():
    big = {**WIDE, "vocab_size": 40_000}

    def of(length):
        model = tiny_model(1, **big)
        state, frozen, step = start(model, random_lora(model), TrainingSection(remat_policy="full"))
        step.compile(state, frozen, accumulated(random_rows([length], length), 1))
        return next(iter(step._compiled.values())).memory_analysis().temp_size_in_bytes

    short, long = of(512), of(2048)
    assert long - short < 0.2 * (2048 - 512) * 40_000 * 4


def test_no_gradient_of_a_frozen_weight_is_computed():
    """4N FLOP a token for the weights, 6 for each number of the adapter, and attention; 6N if all train.

    With one layer, micro-batch and chunk of the loss no loop is left in the program, of whose body XLA would
    count one turn. It counts operations on single numbers, too: some hundreds for each of the width.
    """
    width, inner, length = 256, 1024, 64
    sizes = {"hidden_size": width, "intermediate_size": inner, "head_dim": 64}

    def flops(full):
        model = tiny_model(1, **sizes)
        lora = None if full else random_lora(model, r=4)
        state, frozen, step = start(model, lora, TrainingSection(gradient_checkpointing=False, optim="sgd"))
        step.compile(state, frozen, accumulated(random_rows([length], length), 1))
        return next(iter(step._compiled.values())).cost_analysis()["flops"] / length

    matmul = width * (256 + 2 * 128) + 256 * width + 3 * width * inner + VOCAB * width
    adapter = 4 * ((width + 512) + (256 + width) + (width + 2 * inner) + (inner + width))
    attention = 4 * 64 * length * 2 * (2 + 1 + 4)  # heads · size · keys; scores again in the backward pass
    assert 4 * matmul < flops(full=False) < 4 * matmul + 7 * adapter + attention + 300 * width
    assert flops(full=True) > 5.9 * matmul
