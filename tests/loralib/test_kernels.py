"""How layers keep their weight."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import phi3_jax.loralib as lora
from phi3_jax import InputError
from tests.helpers.loralib_models import Model, assert_close, init
from tests.helpers.models import filled


@pytest.fixture(scope="module")
def model():
    return filled(lambda: Model(nnx.Rngs(0)))


def test_a_layer_that_computes_in_its_own_way_has_the_adapter_in_its_weight(model):
    """Scaled doubles its output: adapter and base alike, merged or not."""
    x, config = jnp.ones((2, 8)), {"scaled": lora.Config(2, 3)}
    adapters = init(model, config)
    adapted = lora.apply(model, adapters).scaled
    expected = 2 * (x @ model.scaled.kernel[...] + x @ adapters["scaled"].delta().T)
    assert_close(adapted(x), expected)
    adapted.eval()
    assert_close(adapted(x), expected)
    with pytest.raises(InputError, match="Scaled computes in a way of its own, in which lora_dropout has no place"):
        lora.init(model, {"scaled": lora.Config(2, lora_dropout=0.1)}, jax.random.key(0))
    with pytest.raises(InputError, match="Scaled computes in a way of its own"):
        lora.apply(model, {"scaled": init(model, {"again": lora.Config(2, lora_dropout=0.1)})["again"]})


def test_features_in_front_are_refused():
    layer = nnx.LinearGeneral(4, 6, axis=1, rngs=nnx.Rngs(0))
    with pytest.raises(InputError, match=r"only the last axes, axis=\(-1,\), can be adapted"):
        lora.init(layer, {".*": lora.Config(2)}, jax.random.key(0))
