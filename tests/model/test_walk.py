"""One layer after another: scanned, one by one, and looked on at."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from phi3_jax.config.model import Phi3Config
from phi3_jax.model import Phi3ForCausalLM
from phi3_jax.model.attention import without_cache
from phi3_jax.model.observer import Observer
from phi3_jax.model.rope import rope_cos_sin
from phi3_jax.system.dotted import nested

CONFIG = Phi3Config(
    vocab_size=40,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=3,
    num_attention_heads=2,
    num_key_value_heads=1,
    resid_pdrop=0.2,
)
SEGMENTS = jnp.array([[1, 1, 1, 2, 2, 0]])
POSITIONS = jnp.array([[0, 1, 2, 0, 1, 0]])
PLACES = ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")


@pytest.fixture(scope="module")
def model() -> Phi3ForCausalLM:
    return Phi3ForCausalLM(CONFIG, rngs=nnx.Rngs(0))


def run_one_by_one(model, x, stack):
    cos_sin = rope_cos_sin(CONFIG, POSITIONS, SEGMENTS, x.dtype)
    attend = without_cache(SEGMENTS, None)
    inputs = []
    for layer in stack:
        inputs.append(x)
        x, _ = layer(x, cos_sin, attend)
    return [*inputs, model.model.norm(x)]


@pytest.mark.parametrize("key", [None, jax.random.key(3)], ids=["evaluation", "dropout"])
def test_layers_one_by_one_are_those_of_the_scan(model, key):
    x = jax.random.normal(jax.random.key(1), (1, 6, 16))
    states = model.hidden_states(
        jnp.ones((1, 6), jnp.int32), inputs_embeds=x, positions=POSITIONS, segment_ids=SEGMENTS, dropout_key=key
    )
    for ours, expected in zip(run_one_by_one(model, x, model.model.stack({}, key)), states, strict=True):
        np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-6)


def test_a_stack_has_as_many_layers_as_it_says(model):
    stack = model.model.stack({})
    assert len(list(stack)) == 3
    own = stack[2].weights["mlp"]["down_proj"]["weight"].get_value()
    np.testing.assert_array_equal(own, model.model.layers.mlp.down_proj.weight[...][2])
    with pytest.raises(IndexError, match="there are 3 layers, counted from 0, and 3 was asked for"):
        stack[3]


def test_an_observer_sees_what_a_module_takes_and_gives_and_changes_nothing(model):
    x = jax.random.normal(jax.random.key(1), (1, 6, 16))
    seen = {}

    class Doubling:
        def __call__(self, y, x, weight, key):
            return 2 * y

        def part(self, rows):
            return self

    def observer(place, adapter=None):
        return Observer(lambda *reported: seen.update({place: reported}), adapter)

    layer = model.model.stack({})[1]
    cos_sin, attend = rope_cos_sin(CONFIG, POSITIONS, SEGMENTS, x.dtype), without_cache(SEGMENTS, None)
    plain, _ = layer(x, cos_sin, attend)
    watched = type(layer)(layer.graph, layer.weights, nested({place: observer(place) for place in PLACES}))
    np.testing.assert_array_equal(watched(x, cos_sin, attend)[0], plain)
    assert tuple(seen) == PLACES
    for given, weight, y, out in seen.values():
        np.testing.assert_allclose(given @ weight.T, y, rtol=1e-5, atol=1e-6)
        assert out is y
    adapters = nested({PLACES[3]: observer(PLACES[3], Doubling())})
    type(layer)(layer.graph, layer.weights, adapters)(x, cos_sin, attend)
    _, _, y, out = seen[PLACES[3]]
    np.testing.assert_array_equal(out, 2 * y)
    assert observer("", Doubling()).part(slice(0, 1)).adapter is not None
