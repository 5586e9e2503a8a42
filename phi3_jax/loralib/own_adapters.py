"""Adapters that loralib has and PEFT has not, and fresh ones of every kind for Flax layers.

Linear layers and embeddings use those of `phi3_jax.lora`.

Their arrays have loralib's names and layouts, whatever the layer's own weight looks like.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, PRNGKeyArray

from phi3_jax.lora.adapters import STATIC, Additive, LoraEmbedding, LoraLinear
from phi3_jax.loralib.kernels import AdaptableLayer, weight_shape
from phi3_jax.model.dropout import dropout
from phi3_jax.model.products import precise_matmul
from phi3_jax.system.errors import InputError


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LoraMergedLinear(Additive):
    """y + s · dropout(x) (B A)ᵀ on the enabled ones of equal slices of the output.

    With n slices enabled, A holds n blocks of r rows and B n blocks of out/slices rows; block i of
    B A is B_i A_i (loralib writes it as a grouped convolution), and the other slices get zero.

    Attributes:
        lora_A: A, `[*stack, r·n, in]`.
        lora_B: B, `[*stack, out/slices·n, r]`.
        enable_lora: A bool for each slice.
        scaling: s.
        dropout: Probability of dropping an entry of x, where the call has a key.

    Example:
        >>> a, b = jnp.ones((1, 3)), jnp.ones((2, 1))
        >>> adapter = LoraMergedLinear(a, b, enable_lora=(True, False), scaling=1.0)
        >>> adapter(jnp.zeros(4), jnp.ones(3), None).tolist()
        [3.0, 3.0, 0.0, 0.0]
    """

    lora_A: Float[Array, "*stack ranks in"]
    lora_B: Float[Array, "*stack enabled r"]
    enable_lora: tuple[bool, ...] = field(metadata=STATIC)
    scaling: float = field(metadata=STATIC)
    dropout: float = field(default=0.0, metadata=STATIC)

    def __call__(
        self,
        y: Float[Array, "*batch out"],
        x: Float[Array, "*batch in"],
        weight: Float[Array, "out in"] | None,
        key: PRNGKeyArray | None = None,
    ) -> Float[Array, "*batch out"]:
        del weight  # a plain update does not look at the base
        x = dropout(x.astype(self.lora_A.dtype), self.dropout, key)
        a, b = self._blocks()
        update = jnp.einsum("...nr,nor->...no", jnp.einsum("...i,nri->...nr", x, a), b)
        return (y + self._padded(update) * self.scaling).astype(y.dtype)

    def delta(self) -> Float[Array, "*stack out in"]:
        """s · B A in float32, zero in the slices that are not enabled."""
        a, b = self._blocks()
        blocks = precise_matmul(b, a)  # [*stack, n, out/slices, in]
        rows = self._padded(blocks.reshape(*blocks.shape[:-2], -1))
        return self.scaling * rows.reshape(*blocks.shape[:-3], -1, blocks.shape[-1])

    def _blocks(self) -> tuple[Float[Array, "*stack n r in"], Float[Array, "*stack n slice r"]]:
        stack, r, n = self.lora_A.shape[:-2], self.lora_B.shape[-1], sum(self.enable_lora)
        return self.lora_A.reshape(*stack, n, r, -1), self.lora_B.reshape(*stack, n, -1, r)

    def _padded(self, blocks: Float[Array, "*batch n size"]) -> Float[Array, "*batch sizes"]:
        """The blocks at their slices' places, zeros at the others'."""
        enabled = jnp.array([i for i, on in enumerate(self.enable_lora) if on])
        shape = (*blocks.shape[:-2], len(self.enable_lora), blocks.shape[-1])
        padded = jnp.zeros(shape, blocks.dtype).at[..., enabled, :].set(blocks)
        return padded.reshape(*blocks.shape[:-2], -1)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LoraConv:
    """A convolution with W + s · (B A).reshape(W.shape) in place of W, so with its `merged` weight.

    There is no dropout, as in loralib. For a window of d sides k, W is `[out, in/groups, k, …, k]`, and

        A `[r·k, in·k^⌈d/2⌉]`,   B `[out/groups·k^⌊d/2⌋, r·k]`,

    so that B A has as many entries as W. In 2d, and wherever k is 1, these are loralib's shapes; for
    1d and 3d with k > 1 loralib takes d = 2 for every d, and its B A does not fit. In a window of
    unequal sides, for which loralib has no rule, the powers become products of the last ⌈d/2⌉ and
    the first ⌊d/2⌋ sides, and the k beside r the longest side.

    Attributes:
        lora_A: A; of stacked layers with leading axes, as B.
        lora_B: B.
        scaling: s.

    Example:
        >>> adapter = LoraConv(jnp.ones((2, 2)), jnp.ones((6, 2)), scaling=0.5)  # r 1, in 1, out 3, window [2, 2]
        >>> adapter.merged(jnp.zeros((3, 1, 2, 2))).shape
        (3, 1, 2, 2)
    """

    lora_A: Float[Array, "*stack ranks columns"]
    lora_B: Float[Array, "*stack rows ranks"]
    scaling: float = field(metadata=STATIC)

    def merged(self, weight: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        """W + s · B A, in float32."""
        return weight.astype(jnp.float32) + self.delta().reshape(weight.shape)

    def unmerged(self, weight: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        """W - s · B A, in float32."""
        return weight.astype(jnp.float32) - self.delta().reshape(weight.shape)

    def delta(self) -> Float[Array, "*stack rows columns"]:
        """s · B A, not yet in the weight's shape."""
        return self.scaling * precise_matmul(self.lora_B, self.lora_A)


@dataclass(frozen=True)
class Config:
    """What a layer's adapter is like, in the names of loralib's constructors.

    Attributes:
        r: The rank.
        lora_alpha: The update is scaled by lora_alpha / r.
        lora_dropout: On the input of a linear layer's adapter.
        enable_lora: A bool for each slice of a fused linear layer; None: one adapter for the whole layer.

    Raises:
        InputError: For values out of range, and for an `enable_lora` that enables nothing: such a layer would
            be silent about having no adapter, and in loralib it fails in its first call.
    """

    r: int
    lora_alpha: float = 1
    lora_dropout: float = 0.0
    enable_lora: Sequence[bool] | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.r, int) or self.r < 1:
            raise InputError(f"r is {self.r}; expected a whole number of at least 1")
        if not self.lora_alpha > 0:
            raise InputError(f"lora_alpha is {self.lora_alpha}; expected a positive number")
        if not 0 <= self.lora_dropout < 1:
            raise InputError(f"lora_dropout is {self.lora_dropout}; expected at least 0 and less than 1")
        if self.enable_lora is not None:
            object.__setattr__(self, "enable_lora", tuple(bool(on) for on in self.enable_lora))
            if not any(self.enable_lora):
                raise InputError(
                    f"enable_lora is {list(self.enable_lora)}, which enables no slice; enable one, or leave the layer "
                    "without an adapter (r=0)"
                )


LayerAdapter: TypeAlias = LoraLinear | LoraMergedLinear | LoraEmbedding | LoraConv


def new_adapter(layer: AdaptableLayer, config: Config, key: PRNGKeyArray) -> LayerAdapter:
    """A fresh adapter that fits a layer, in float32: it adds nothing yet.

    As in loralib, A is Kaiming-uniform with a = √5, that is uniform in ±1/√columns, and B zero; of an
    embedding A is zero and B standard normal. A stacked layer gets stacked arrays.

    Args:
        layer: Abstract ones (`nnx.eval_shape`) too.
        config: Rank, scale, dropout and slices.
        key: What is drawn is drawn from it.

    Raises:
        InputError: Where the configuration asks for what loralib has for other layers.
    """
    kind = type(layer).__name__
    if config.enable_lora is not None and not isinstance(layer, nnx.Linear | nnx.LinearGeneral):
        raise InputError(f"enable_lora is for linear layers, not for {kind}; leave it out")
    if config.lora_dropout and isinstance(layer, nnx.Embed | nnx.Conv):
        raise InputError(f"lora_dropout has no effect on {kind} in loralib; leave it out there")
    stack, shape = weight_shape(layer)
    scaling = config.lora_alpha / config.r
    if isinstance(layer, nnx.Embed):
        vocab, features = shape
        normal = jax.random.normal(key, (*stack, features, config.r), jnp.float32)
        return LoraEmbedding(jnp.zeros((*stack, config.r, vocab), jnp.float32), normal, scaling)
    if isinstance(layer, nnx.Conv):
        return LoraConv(*_a_and_b(stack, *_conv_shapes(layer, config.r), key), scaling)
    out_features, in_features = shape
    if config.enable_lora is None:
        initial = _a_and_b(stack, (config.r, in_features), (out_features, config.r), key)
        return LoraLinear(*initial, scaling, config.lora_dropout)
    slices, enabled = len(config.enable_lora), sum(config.enable_lora)
    if out_features % slices:
        raise InputError(f"enable_lora has {slices} entries, which do not divide the {out_features} output features")
    shapes = (config.r * enabled, in_features), (out_features // slices * enabled, config.r)
    return LoraMergedLinear(*_a_and_b(stack, *shapes, key), tuple(config.enable_lora), scaling, config.lora_dropout)


def _conv_shapes(conv: nnx.Conv, r: int) -> tuple[tuple[int, int], tuple[int, int]]:
    window = tuple(conv.kernel_size)
    half = len(window) // 2
    ranks = r * max(window)
    columns = conv.in_features * math.prod(window[half:])
    rows = conv.out_features // conv.feature_group_count * math.prod(window[:half])
    return (ranks, columns), (rows, ranks)


def _a_and_b(
    stack: tuple[int, ...], a_shape: tuple[int, int], b_shape: tuple[int, int], key: PRNGKeyArray
) -> tuple[Float[Array, "*stack ranks columns"], Float[Array, "*stack rows r"]]:
    bound = 1 / math.sqrt(a_shape[1])
    a = jax.random.uniform(key, (*stack, *a_shape), jnp.float32, -bound, bound)
    return a, jnp.zeros((*stack, *b_shape), jnp.float32)
