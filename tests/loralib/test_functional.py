"""`init`, `apply`, `extract` and `merge` on models that know nothing of adapters."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import phi3_jax.loralib as lora
from phi3_jax import InputError
from tests.helpers.loralib_models import Model, Scaled, assert_close, init
from tests.helpers.models import filled

LAYERS = [
    "attention.key",
    "attention.out",
    "attention.query",
    "attention.value",
    "again",
    "conv",
    "embed",
    "scaled",
]
IDS = jnp.array([[1, 2, 3, 4], [5, 6, 7, 8]])


@pytest.fixture(scope="module")
def model():
    return filled(lambda: Model(nnx.Rngs(0)))


def test_every_layer_is_adapted_and_the_model_stays_as_it_is(model):
    before = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(model)))
    adapters = init(model)
    assert set(adapters) == set(LAYERS)
    y = model(IDS)
    adapted = lora.apply(model, adapters)
    assert type(adapted) is Model
    assert type(model.scaled) is Scaled
    assert isinstance(adapted.scaled, Scaled)
    assert adapted.again is adapted.blocks[0]
    assert adapted.scaled.kernel[...] is model.scaled.kernel[...]  # shared, no copy
    for name in LAYERS:  # each on its own changes the output, and as a merged weight would
        one = {name: adapters[name]}
        found = lora.apply(model, one)(IDS)
        assert np.abs(found - y).max() > 1e-3 * np.abs(y).max(), name
        assert_close(lora.merge(model, one)(IDS), found)
    merged = lora.merge(model, adapters)
    assert_close(merged(IDS), adapted(IDS))
    assert_close(lora.unmerge(merged, adapters)(IDS), y)
    adapted.eval()
    assert_close(adapted(IDS), merged(IDS))
    np.testing.assert_array_equal(model(IDS), y)
    jax.tree.map(np.testing.assert_array_equal, nnx.to_pure_dict(nnx.state(model)), before)
    assert type(model.conv) is nnx.Conv


def test_a_fresh_adapter_adds_nothing(model):
    adapters = lora.init(model, {".*": lora.Config(2, 3)}, jax.random.key(0))
    np.testing.assert_array_equal(lora.apply(model, adapters)(IDS), model(IDS))


def test_gradients_are_those_of_the_merged_weights(model):
    """Under jit, for every array: the low-rank path and W + s B A are one function of A and B."""
    adapters = init(model)
    graph, base = nnx.split(model)

    def gradient(made):
        def loss(adapters, base):
            return jnp.mean(jnp.square(made(nnx.merge(graph, base), adapters)(IDS)))

        return jax.jit(jax.grad(loss))(adapters, base)

    found, expected = gradient(lora.apply), gradient(lora.merge)
    assert jax.tree.structure(found) == jax.tree.structure(adapters)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert np.any(b)
        assert_close(a, b, rtol=1e-4)


def test_apply_makes_the_same_program_each_time(model):
    calls = []

    @jax.jit
    def run(graph_and_state, ids):
        calls.append(1)
        return nnx.merge(*graph_and_state)(ids)

    for seed in (0, 1):
        run(nnx.split(lora.apply(model, init(model, seed=seed))), IDS)
    assert len(calls) == 1


def test_extract_is_the_reverse_of_apply(model):
    adapters = init(model, {"query|value": lora.Config(2, 3, 0.5, [True, False]), "embed": lora.Config(1)})
    found = lora.extract(lora.apply(model, adapters))
    assert jax.tree.structure(found) == jax.tree.structure(adapters)
    jax.tree.map(np.testing.assert_array_equal, found, adapters)
    assert lora.extract(model) == {}


def test_dropout_needs_a_key_and_differs_by_layer(model):
    adapters = init(model, {"query|key": lora.Config(2, 3, lora_dropout=0.5)})
    y = lora.apply(model, adapters)(IDS)
    np.testing.assert_array_equal(lora.apply(model, adapters)(IDS), y)
    first, again, other = (lora.apply(model, adapters, jax.random.key(seed))(IDS) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert np.any(first != y)
    assert np.any(first != other)
    adapted = lora.apply(model, adapters, jax.random.key(0)).attention
    assert np.any(adapted.query.dropout_keys[...] != adapted.key.dropout_keys[...])
    dropped = lora.apply(model, adapters, jax.random.key(0))
    dropped.eval()
    assert_close(dropped(IDS), y)


def test_patterns(model):
    """A whole name or its last parts; of several the first; numbers depend on name and key alone."""
    first = lora.init(model, {"attention.query": lora.Config(3), "attention.*": lora.Config(2)}, jax.random.key(0))
    assert {name: adapter.rank for name, adapter in first.items()} == {
        "attention.key": 2,
        "attention.out": 2,
        "attention.query": 3,
        "attention.value": 2,
    }
    second = lora.init(model, {"value|ery": lora.Config(2)}, jax.random.key(0))
    assert set(second) == {"attention.value"}
    np.testing.assert_array_equal(second["attention.value"].lora_A, first["attention.value"].lora_A)
    assert np.any(second["attention.value"].lora_A != first["attention.key"].lora_A)
    other = lora.init(model, {"value": lora.Config(2)}, jax.random.key(1))
    assert np.any(second["attention.value"].lora_A != other["attention.value"].lora_A)
    abstract = lora.init(nnx.eval_shape(lambda: Model(nnx.Rngs(0))), {"value": lora.Config(2)}, jax.random.key(1))
    np.testing.assert_array_equal(abstract["attention.value"].lora_A, other["attention.value"].lora_A)


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        (
            {"q_proj": lora.Config(2)},
            f"'q_proj' matches no layer that can have an adapter; the model has {', '.join(sorted(LAYERS))}$",
        ),
        ({r"blocks\.1": lora.Config(2)}, "matches no layer that can have an adapter"),
        ({"con": lora.Config(2)}, "'con' matches no layer"),
        ({".*": lora.Config(2), "conv": lora.Config(3)}, "'conv' matches only layers that an earlier pattern took"),
        ({"*": lora.Config(2)}, "'[*]' is no regular expression"),
        ({"conv": lora.Config(2, lora_dropout=0.1)}, r"conv \(pattern 'conv'\): lora_dropout has no effect on Conv"),
    ],
    ids=str,
)
def test_init_refuses(model, patterns, message):
    with pytest.raises(InputError, match=message) as error:
        lora.init(model, patterns, jax.random.key(0))
    assert "\n" not in str(error.value)


def test_adapters_of_another_model_are_refused(model):
    adapters = init(model)
    with pytest.raises(InputError, match="an adapter for head, but no layer of that name"):
        lora.apply(model, {"head": adapters["conv"]})
    for name, other in [("embed", "again"), ("again", "embed"), ("conv", "embed"), ("embed", "conv")]:
        with pytest.raises(InputError, match=f"adapter of {name} .* does not fit its weight") as error:
            lora.apply(model, {name: adapters[other]})
        assert "\n" not in str(error.value)
        with pytest.raises(InputError, match="does not fit its weight"):
            lora.merge(model, {name: adapters[other]})
    with pytest.raises(InputError, match="an adapter for again, but no layer of that name"):
        lora.apply(lora.apply(model, adapters), adapters)


@pytest.mark.parametrize("key", [None, jax.random.key(3)], ids=["plain", "dropout"])
def test_stacked_layers(key):
    """Layers that nnx.vmap stacks and nnx.scan runs: as one by one."""

    @nnx.vmap(in_axes=0, out_axes=0)
    def stacked(key):
        return nnx.Linear(4, 4, rngs=nnx.Rngs(key))

    @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
    def run(x, layer):
        return jnp.tanh(layer(x))

    layers = filled(lambda: stacked(jax.random.split(jax.random.key(0), 3)))
    adapters = init(layers, {".*": lora.Config(2, lora_dropout=0.5)})
    assert adapters[""].lora_A.shape == (3, 2, 4)
    x = jnp.ones((2, 4))
    adapted = lora.apply(layers, adapters, key)
    expected = x
    for i in range(3):
        adapter = jax.tree.map(lambda leaf, i=i: leaf[i], adapters[""])
        y = expected @ layers.kernel[i] + layers.bias[i]
        layer_key = None if key is None else adapted.dropout_keys[...][i]
        expected = jnp.tanh(adapter(y, expected, None, layer_key))
    assert_close(run(x, adapted), expected)
    if key is None:
        assert_close(run(x, lora.merge(layers, adapters)), expected)


def test_a_shared_weight_is_adapted_where_it_was_asked_for():
    """Two layers with one variable: merging into one leaves the other, as `apply` does."""

    class Tied(nnx.Module):
        def __init__(self, rngs):
            self.a = nnx.Linear(4, 4, rngs=rngs)
            self.b = nnx.Linear(4, 4, rngs=rngs)
            self.b.kernel = self.a.kernel

        def __call__(self, x):
            return self.b(jnp.tanh(self.a(x)))

    tied, x = filled(lambda: Tied(nnx.Rngs(0))), jnp.ones((2, 4))
    adapters = init(tied, {"a": lora.Config(2)})
    assert_close(lora.merge(tied, adapters)(x), lora.apply(tied, adapters)(x))


def test_loralibs_layers_without_a_rank_take_adapters_too():
    class Mine(nnx.Module):
        def __init__(self, rngs):
            self.fc = lora.Linear(6, 4, rngs=rngs)
            self.conv = lora.Conv1d(4, 4, 3, rngs=rngs)
            self.own = lora.Linear(4, 4, r=2, rngs=rngs)

        def __call__(self, x):
            return self.own(self.conv(self.fc(x)))

    mine, x = filled(lambda: Mine(nnx.Rngs(0))), jnp.ones((2, 5, 6))
    adapters = init(mine)
    assert set(adapters) == {"fc", "conv.conv"}  # not those that have one
    adapted = lora.apply(mine, adapters)
    assert_close(adapted(x), lora.merge(mine, adapters)(x))
    assert np.abs(adapted(x) - mine(x)).max() > 0.01
    assert set(lora.extract(adapted)) == {"fc", "conv.conv", "own"}
    with pytest.raises(InputError, match="the model has none"):  # not the convolution inside either
        lora.init(
            filled(lambda: lora.Conv1d(4, 4, 3, r=2, rngs=nnx.Rngs(0))), {".*": lora.Config(2)}, jax.random.key(0)
        )
