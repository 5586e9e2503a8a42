"""A model with every kind of layer that takes adapters."""

import jax
import numpy as np
from flax import nnx

import phi3_jax.loralib as lora
from tests.helpers.models import filled


class Scaled(nnx.Linear):
    """A user's own kind of linear layer."""

    def __call__(self, x):
        return 2 * super().__call__(x)


class Model(nnx.Module):
    """Every kind of layer, a subclass, a layer used twice, and a table that also scores."""

    def __init__(self, rngs):
        self.embed = nnx.Embed(9, 8, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(2, 8, rngs=rngs, decode=False)
        self.blocks = nnx.List([nnx.Linear(8, 8, rngs=rngs), nnx.LayerNorm(8, rngs=rngs)])
        self.again = self.blocks[0]
        self.conv = nnx.Conv(8, 8, (3,), feature_group_count=2, kernel_dilation=2, rngs=rngs)
        self.scaled = Scaled(8, 8, use_bias=False, rngs=rngs)

    def __call__(self, ids):
        x = self.embed(ids)
        x = x + self.attention(x)
        x = self.again(self.blocks[1](self.blocks[0](x)))
        return self.embed.attend(self.scaled(self.conv(x)))


def init(model, patterns=None, seed=0):
    """Adapters with nothing zero, as after some training."""
    return filled(lambda: lora.init(model, patterns or {".*": lora.Config(2, 3)}, jax.random.key(0)), seed)


def assert_close(a, b, rtol=1e-5):
    assert np.abs(np.asarray(a) - b).max() <= rtol * np.abs(b).max()
