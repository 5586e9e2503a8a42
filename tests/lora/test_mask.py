import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from phi3_jax import InputError
from phi3_jax.lora import combine, freeze, partition, trainable_mask

IDS = jnp.array([[5, 3, 9, 1], [2, 2, 17, 18]])


@pytest.fixture(scope="module")
def setting(tiny, random_lora):
    """(graph, tree of base and adapter, mask) of adapter training."""
    model = tiny()
    lora = random_lora(model, target_modules="all-linear")
    graph, state = nnx.split(model)
    return graph, {"model": state, "lora": lora}, trainable_mask(model, lora)


def loss(graph, tree):
    return jnp.mean(nnx.merge(graph, tree["model"])(IDS, lora=tree["lora"]) ** 2)


def bits(tree):
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


def train(graph, tree, tx, steps=5):
    state = tx.init(tree)
    step = jax.jit(lambda tree, state: tx.update(jax.grad(lambda t: loss(graph, t))(tree), state, tree))
    for _ in range(steps):
        updates, state = step(tree, state)
        tree = optax.apply_updates(tree, updates)
    return tree, state


def array_sizes(tree):
    return sorted(leaf.size for leaf in jax.tree.leaves(tree) if leaf.ndim)


def test_the_mask_is_the_adapter_or_everything(tiny, random_lora):
    model = tiny()
    lora = random_lora(model)
    adapter = trainable_mask(model, lora)
    assert jax.tree.structure(adapter) == jax.tree.structure({"model": nnx.state(model), "lora": lora})
    assert not any(jax.tree.leaves(adapter["model"]))
    assert all(jax.tree.leaves(adapter["lora"]))
    assert jax.tree.leaves(trainable_mask(nnx.state(model), lora)) == jax.tree.leaves(adapter)
    everything = trainable_mask(model, None, full_finetuning=True)
    assert everything["lora"] is None
    assert len(jax.tree.leaves(everything)) == 9
    assert all(jax.tree.leaves(everything))


def test_nothing_to_train_is_an_error(tiny):
    with pytest.raises(InputError, match="nothing would train"):
        trainable_mask(tiny(), None)


def test_partition_and_combine(setting):
    _, tree, mask = setting
    trainable, frozen = partition(tree, mask)
    assert jax.tree.leaves(trainable["model"]) == []
    assert jax.tree.leaves(frozen["lora"]) == []
    back = combine(trainable, frozen)
    assert jax.tree.structure(back) == jax.tree.structure(tree)
    assert all(a is b for a, b in zip(jax.tree.leaves(back), jax.tree.leaves(tree), strict=True))


def test_gradients_of_the_trainable_half_are_those_of_the_adapter(setting):
    graph, tree, mask = setting
    trainable, frozen = partition(tree, mask)
    grads = jax.jit(jax.grad(lambda t: loss(graph, combine(t, frozen))))(trainable)
    assert jax.tree.structure(grads) == jax.tree.structure(trainable)
    assert len(jax.tree.leaves(grads)) == 8
    assert all(np.any(leaf) for leaf in jax.tree.leaves(grads))


def test_freeze_leaves_the_base_bit_for_bit(setting):
    graph, tree, mask = setting
    # Weight decay and momentum move what has no gradient; a freeze by zero gradients would not do.
    tx = freeze(optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2, weight_decay=0.5)), mask)
    trained, state = train(graph, tree, tx)
    assert bits(trained["model"]) == bits(tree["model"])
    assert all(a != b for a, b in zip(bits(trained["lora"]), bits(tree["lora"]), strict=True))
    # Adam's two moments of the adapter's arrays, and of nothing else.
    assert array_sizes(state) == sorted(2 * array_sizes(tree["lora"]))


def test_freeze_trains_as_the_partitioned_half_does(setting):
    graph, tree, mask = setting
    tx = optax.chain(optax.clip_by_global_norm(0.01), optax.adamw(1e-2))
    whole, _ = train(graph, tree, freeze(tx, mask))
    trainable, frozen = partition(tree, mask)
    state = tx.init(trainable)
    assert array_sizes(state) == sorted(2 * array_sizes(tree["lora"]))
    for _ in range(5):
        grads = jax.grad(lambda t: loss(graph, combine(t, frozen)))(trainable)
        updates, state = tx.update(grads, state, trainable)
        trainable = optax.apply_updates(trainable, updates)
    for a, b in zip(jax.tree.leaves(whole["lora"]), jax.tree.leaves(trainable), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_optax_masked_does_not_freeze(setting):
    """Why `freeze` is no `optax.masked`: that applies the raw gradients to what it masks out."""
    graph, tree, mask = setting
    trained, _ = train(graph, tree, optax.masked(optax.sgd(1e-3), mask), steps=1)
    assert bits(trained["model"]) != bits(tree["model"])


def test_full_fine_tuning_goes_through_the_same_mask(tiny):
    model = tiny()
    graph, state = nnx.split(model)
    tree = {"model": state, "lora": None}
    mask = trainable_mask(model, None, full_finetuning=True)
    trained, optimizer_state = train(graph, tree, freeze(optax.adam(1e-2), mask), steps=1)
    assert all(a != b for a, b in zip(bits(trained), bits(tree), strict=True))
    assert array_sizes(optimizer_state) == sorted(2 * array_sizes(tree))
