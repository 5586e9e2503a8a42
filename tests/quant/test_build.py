"""A model made leaf by leaf."""

import jax
import jax.numpy as jnp

from phi3_jax.model.layers import SplitWeight
from phi3_jax.model.leaves import abstract_model, model_leaves
from phi3_jax.quant.build import build_model
from tests.helpers.models import CONFIG


class Counting:
    """Every leaf full of the number of rows that are asked for."""

    def quantizes(self, path, leaf):
        return False

    def dense(self, path, leaf, rows=None):
        shape = leaf.get_value().shape
        size = shape[-2] if rows is None and len(shape) > 1 else rows.stop - rows.start if rows else 0
        return jnp.full((*shape[:-2], size, shape[-1]) if len(shape) > 1 else shape, float(size))


def test_fused_weights_are_split_where_that_is_asked_for():
    empty = abstract_model(CONFIG)
    path = ("model", "layers", "self_attn", "qkv_proj", "weight")
    whole, split = (model_leaves(build_model(empty, Counting(), split=on))[path].get_value() for on in (False, True))
    assert isinstance(whole, jax.Array)
    assert whole.max() == whole.shape[-2] == 64
    assert isinstance(split, SplitWeight)
    assert [float(part.max()) for part in split.parts] == [32, 16, 16]
