"""The loss in chunks: the plain formula's values and gradients, and what it does without."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from phi3_jax.lora.adapters import DoraLinear, HeadRows, LoraLinear
from phi3_jax.model.layers import dropout
from phi3_jax.objectives import cross_entropy
from phi3_jax.objectives.cross_entropy import chunk_tokens, cross_entropy_sums
from phi3_jax.parallel.mesh import AXES

HIDDEN, VOCAB, CHUNK = 24, 61, 8


@pytest.fixture(autouse=True, scope="module")
def _small_chunks() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(cross_entropy.LEAST_TOKENS, "cpu", CHUNK)
        patch.setitem(cross_entropy.CHUNK_LOGITS, "cpu", CHUNK * VOCAB)
        yield


def example(batch: int, seq: int, dtype: Any = jnp.float32) -> tuple[jax.Array, ...]:
    """x, head, targets and is_target; the last row has no target."""
    rng = np.random.default_rng(batch * seq)
    x = jnp.asarray(rng.normal(size=(batch, seq, HIDDEN)), dtype)
    head = jnp.asarray(0.5 * rng.normal(size=(VOCAB, HIDDEN)), dtype)
    is_target = rng.random((batch, seq)) < 0.7
    is_target[-1] = False
    return x, head, jnp.asarray(rng.integers(0, VOCAB, (batch, seq)), jnp.int32), jnp.asarray(is_target)


@pytest.mark.parametrize(
    ("device", "vocab", "tokens"), [("tpu", 32_064, 1024), ("tpu", 200_064, 688), ("gpu", 200_064, 512)]
)
def test_a_large_vocabulary_leaves_a_chunk_tokens_enough_to_be_worth_reading_the_head(device, vocab, tokens):
    kind = AbstractDevice("any", None, device)
    mesh = AbstractMesh((1, 1, 1, 1), AXES, (AxisType.Auto,) * 4, abstract_device=kind)
    with jax.sharding.use_abstract_mesh(mesh):
        assert chunk_tokens(8192, vocab) == tokens


def adapted(logits, x, head, adapter, key):
    return adapter(logits, x, head, key)


def plain(x, head, targets, is_target, *, label_smoothing=0.0, adapter=None):
    """The formula with all logits at once."""
    logits = jnp.einsum("bth,vh->btv", x, head, preferred_element_type=jnp.float32)
    if adapter is not None:
        logits = adapter(logits, x, head, None)
    log_p = jax.nn.log_softmax(logits)
    label = (1 - label_smoothing) * jax.nn.one_hot(targets, VOCAB) + label_smoothing / VOCAB
    losses = -jnp.sum(label * log_p, axis=-1)
    return jnp.sum(losses, where=is_target), jnp.sum(is_target & (logits.argmax(-1) == targets))


def assert_close(actual: Any, expected: Any, tolerance: float = 2e-6) -> None:
    """Every array within `tolerance` of the largest number in it."""
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * np.abs(b).max())


@pytest.mark.parametrize(
    ("shape", "label_smoothing"),
    [((2, 16), 0.0), ((3, 7), 0.1), ((2, 3), 0.0)],
    ids=["even", "padded, smoothed", "one chunk"],
)
def test_plain_formula(shape: tuple[int, int], label_smoothing: float):
    x, head, targets, is_target = example(*shape)
    targets = targets.at[0].set(plain_guesses(x, head)[0])  # some are right

    def of(sums):
        def mean(x, head):  # what reaches the sum is a cotangent of 1/3
            total, correct = sums(x, head, targets, is_target, label_smoothing=label_smoothing)
            return total / 3, correct

        return jax.jit(jax.value_and_grad(mean, (0, 1), has_aux=True))(x, head)

    (loss, correct), grads = of(cross_entropy_sums)
    (expected_loss, expected_correct), expected_grads = of(plain)
    assert correct == expected_correct > 0
    assert_close((loss, grads), (expected_loss, expected_grads))
    # Evaluation takes another way to the same sum.
    total, correct = cross_entropy_sums(x, head, targets, is_target, label_smoothing=label_smoothing)
    assert correct == expected_correct
    assert_close(total / 3, expected_loss)


def plain_guesses(x: jax.Array, head: jax.Array) -> jax.Array:
    return jnp.einsum("bth,vh->btv", x, head).argmax(-1)


def test_of_equals_the_first_is_the_guess():
    x, head, targets, _ = example(2, 8)
    guesses = plain_guesses(x, head)
    twins = jnp.concatenate([head, head])
    everywhere = jnp.ones(targets.shape, bool)
    assert cross_entropy_sums(x, twins, guesses, everywhere)[1] == 16
    assert cross_entropy_sums(x, twins, guesses + VOCAB, everywhere)[1] == 0


def test_without_targets_loss_and_gradients_are_zero():
    x, head, targets, _ = example(2, 12)
    x = x.at[0, 3].set(jnp.inf)  # and nothing that is no target is looked at
    nowhere = jnp.zeros(targets.shape, bool)
    total, dx = jax.jit(jax.value_and_grad(lambda x: cross_entropy_sums(x, head, targets, nowhere)[0]))(x)
    assert total == 0
    assert not dx.any()


def test_bfloat16_is_as_near_as_its_rounding():
    x, head, targets, is_target = example(3, 20, jnp.bfloat16)

    def grads(sums, x, head):
        return jax.jit(jax.value_and_grad(lambda x, head: sums(x, head, targets, is_target)[0], (0, 1)))(x, head)

    loss, (dx, dhead) = grads(cross_entropy_sums, x, head)
    truth, (true_dx, true_dhead) = grads(plain, x.astype(jnp.float32), head.astype(jnp.float32))
    assert dx.dtype == dhead.dtype == jnp.bfloat16
    assert_close(loss, truth)  # the logits are float32
    for grad, true_grad in ((dx, true_dx), (dhead, true_dhead)):
        error = np.linalg.norm(grad.astype(jnp.float32) - true_grad) / np.linalg.norm(true_grad)
        assert error < 2**-8  # half a unit in the last place, twice: of the logits' gradient, and of the result


def adapters() -> dict[str, Any]:
    rng = np.random.default_rng(5)
    a, b, rows = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((2, HIDDEN), (VOCAB, 2), (3, HIDDEN)))
    magnitude = jnp.asarray(rng.uniform(0.5, 2, VOCAB), jnp.float32)
    return {
        "LoRA": LoraLinear(a, b, scaling=0.5),
        "DoRA": DoraLinear(a, b, magnitude, scaling=0.5),
        "token rows": HeadRows(rows, ids=(0, 7, 60)),
    }


@pytest.mark.parametrize("kind", adapters())
def test_adapters_on_the_head(kind: str):
    x, head, targets, is_target = example(3, 7)

    def chunked(x, adapter):
        return cross_entropy_sums(x, head, targets, is_target, adjust=adapted, adapters=adapter)

    def whole(x, adapter):
        return plain(x, head, targets, is_target, adapter=adapter)

    outcomes = [
        jax.jit(jax.value_and_grad(sums, (0, 1), has_aux=True))(x, adapters()[kind]) for sums in (chunked, whole)
    ]
    assert_close(*outcomes)


def test_gradients_are_those_asked_for():
    x, head, targets, is_target = example(2, 16)
    lora = adapters()["LoRA"]

    def of_B(lora_B, sums):  # as in LoRA-FA, where A is frozen
        return sums(LoraLinear(lora.lora_A, lora_B, lora.scaling))[0]

    def chunked(adapter):
        return cross_entropy_sums(x, head, targets, is_target, adjust=adapted, adapters=adapter)

    def whole(adapter):
        return plain(x, head, targets, is_target, adapter=adapter)

    actual, expected = (jax.jit(jax.grad(partial(of_B, sums=sums)))(lora.lora_B) for sums in (chunked, whole))
    assert_close(actual, expected)


def dropped(logits, x, head, adapters, key):
    return dropout(logits, 0.5, key)


def test_each_chunk_has_its_own_dropout():
    x, head, targets, _ = example(1, CHUNK)
    twice = [jnp.concatenate([part, part], axis=1) for part in (x, targets)]
    key = jax.random.key(0)
    once, again = (
        cross_entropy_sums(x, head, targets, jnp.ones(targets.shape, bool), adjust=dropped, key=key)[0]
        for x, targets in ((x, targets), twice)
    )
    assert abs(again - 2 * once) > 0.1


def test_what_is_frozen_costs_no_product():
    """Also inside a loop over micro-batches, as in a training step."""
    x, head, targets, is_target = example(2, 16)

    def loss(x, head):
        return cross_entropy_sums(x, head, targets, is_target)[0]

    def step(x, head):
        def micro(total, batch):
            return total + cross_entropy_sums(x, head, *batch)[0], None

        return jax.lax.scan(micro, 0.0, (targets[None], is_target[None]))[0]

    def products(function: Any) -> int:  # as traced: no compiler has removed what is never used
        return str(jax.make_jaxpr(function)(x, head)).count("dot_general[")

    for function in (loss, step):
        assert products(function) == 1
        assert products(jax.grad(function, 0)) == 2
        assert products(jax.grad(function, 1)) == 2
        assert products(jax.grad(function, (0, 1))) == 3


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_products_are_exact_in_float32_and_quick_in_bfloat16(dtype: Any):
    """Wherever the gradient is taken: no context of the caller's is needed."""
    x, head, targets, is_target = example(2, 16, dtype)

    def loss(x, head):
        return cross_entropy_sums(x, head, targets, is_target)[0]

    text = jax.jit(jax.grad(loss, (0, 1))).lower(x, head).as_text()
    lines = [line for line in text.splitlines() if "stablehlo.dot_general" in line]
    assert len(lines) == 3
    if dtype == jnp.float32:
        assert all("HIGHEST, HIGHEST" in line for line in lines)
    else:  # operands of 16 bits, results of 32
        assert all(re.search(r"\(tensor<\w+xbf16>, tensor<\w+xbf16>\) -> tensor<\w+xf32>", line) for line in lines)


@pytest.mark.optimized
@pytest.mark.parametrize("gradient", [True, False])
def test_memory_does_not_grow_with_the_vocabulary_times_length(gradient: bool):
    def temporaries(tokens: int) -> int:
        shapes = (
            ((1, tokens, HIDDEN), jnp.float32),
            ((VOCAB, HIDDEN), jnp.float32),
            ((1, tokens), jnp.int32),
            ((1, tokens), bool),
        )

        def loss(*args):
            return cross_entropy_sums(*args)[0]

        compiled = jax.jit(jax.value_and_grad(loss) if gradient else loss).lower(
            *(jax.ShapeDtypeStruct(*s) for s in shapes)
        )
        return compiled.compile().memory_analysis().temp_size_in_bytes

    short, long = temporaries(64), temporaries(1024)
    # At most one copy of x; a tenth of the logits at most.
    assert long - short <= (1024 - 64) * HIDDEN * 4 * 1.1


MESHES = """
import re
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from phi3_jax.lora.adapters import LoraLinear
from phi3_jax.model.layers import dropout
from phi3_jax.parallel.mesh import make_mesh
from phi3_jax.parallel.sharding import spec
from phi3_jax.objectives import cross_entropy

cross_entropy.LEAST_TOKENS["cpu"] = 4
cross_entropy.CHUNK_LOGITS["cpu"] = 4 * 64
rng = np.random.default_rng(0)
x, head, a, b = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((8, 16, 24), (64, 24), (2, 24), (64, 2)))
targets = jnp.asarray(rng.integers(0, 64, (8, 16)), jnp.int32)
is_target = jnp.asarray(rng.random((8, 16)) < 0.7)

def adapted(logits, x, head, adapter, key):
    return adapter(logits, x, head, key)

def loss(x, head, lora, targets, is_target):
    return cross_entropy.cross_entropy_sums(
        x, head, targets, is_target, adjust=adapted, adapters=lora, label_smoothing=0.1)

step = jax.value_and_grad(loss, (0, 1, 2), has_aux=True)
args = x, head, LoraLinear(a, b, 0.5), targets, is_target
expected = jax.jit(step)(*args)

def compare(args, expected, **parallel):
    mesh = make_mesh(parallel)
    with jax.set_mesh(mesh):
        cut = lambda array, *axes: jax.device_put(array, NamedSharding(mesh, spec(array.shape, axes, mesh)))
        x, head, lora, targets, is_target = args
        lora = jax.device_put(lora, NamedSharding(mesh, PartitionSpec()))
        args = cut(x, "batch", "seq", None), cut(head, "kept_heads", None), lora, *(
            cut(array, "batch", "seq") for array in (targets, is_target))
        compiled = jax.jit(step).lower(*args).compile()
        actual = compiled(*args)
    for one, other in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=2e-6 * np.abs(other).max(), err_msg=str(parallel))
    text = compiled.as_text()
    kinds = "all-gather|all-to-all|collective-permute|all-reduce|reduce-scatter"
    found = re.findall(rf"= (.*?) ({kinds})(?:-start)?\\(", text)
    # The head's rows are gathered once; all else are sums.
    assert [kind for _, kind in found if kind != "all-reduce"] == ["all-gather"], found
    # One number a token, rows of the hidden width, and the weights' gradients; nothing as wide as the vocabulary.
    allowed = {(), (2, 24), (64 // mesh.shape["tensor"], 24), (64 // mesh.shape["tensor"], 2)}
    for shapes, kind in found:
        for shape in re.findall(r"\\w+\\[([\\d,]*)\\]", shapes):
            shape = tuple(int(size) for size in shape.split(",") if size)
            assert kind == "all-gather" or shape in allowed or shape[1:] in ((), (1,), (2,), (24,)), (parallel, found)

compare(args, expected, data=2, tensor=2, context=2)
compare(args, expected, fsdp=8)
compare(args, expected, tensor=4, context=2)

# Each device draws its own dropout.
def dropped(logits, x, head, adapters, key):
    return dropout(logits, 0.5, key)

def dropped_loss(rows, key):
    x, targets, is_target = rows
    return cross_entropy.cross_entropy_sums(x, head, targets, is_target, adjust=dropped, key=key)[0]

row, key = (x[:1], targets[:1], is_target[:1]), jax.random.key(3)
expected = sum(dropped_loss(row, jax.random.fold_in(key, device)) for device in range(8))
with jax.set_mesh(make_mesh({"fsdp": 8})):
    rows = jax.tree.map(lambda array: jnp.repeat(array, 8, axis=0), row)
    np.testing.assert_allclose(dropped_loss(rows, key), expected, rtol=2e-6)
print("equal")
"""


def test_equal_on_every_mesh_with_few_collectives():
    command = [sys.executable, "-c", MESHES]
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    run = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **flags}, check=False)
    assert run.stdout == "equal\n", run.stderr
