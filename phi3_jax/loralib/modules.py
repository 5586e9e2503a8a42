"""loralib's layers: Flax layers that are made with an adapter."""

from collections.abc import Sequence
from typing import Any, ClassVar

import jax
from flax import nnx
from jaxtyping import Array

from phi3_jax.loralib.adapted import LoRAConv, LoRAEmbedding, LoRALayer, LoRALinear
from phi3_jax.loralib.own_adapters import Config, new_adapter
from phi3_jax.system.errors import InputError


class Linear(LoRALinear, nnx.Linear):
    """`nnx.Linear` with an adapter in `lora_A` `[r, in]` and `lora_B` `[out, r]`.

    Args:
        in_features: Size of the input's last axis.
        out_features: Size of the output's.
        r: The rank; 0 leaves a plain layer.
        lora_alpha: The update is scaled by lora_alpha / r.
        lora_dropout: Probability of dropping an entry of the adapter's input in training.
        fan_in_fan_out: Whether `kernel` is `[in, out]` as in Flax (the default here, as PyTorch's
            `[out, in]` is in loralib).
        merge_weights: Whether `eval()` merges.
        rngs: What the weights, the adapter and dropout are drawn from.
        **kwargs: Go to `nnx.Linear`.

    Raises:
        InputError: For values out of range.

    Example:
        >>> import jax.numpy as jnp
        >>> layer = Linear(4, 3, r=2, rngs=nnx.Rngs(0))
        >>> layer.lora_A.shape, layer.lora_B.shape, layer(jnp.ones((1, 4))).shape
        ((2, 4), (3, 2), (1, 3))
    """

    base_class = nnx.Linear

    def __init__(
        self,
        in_features: int,
        out_features: int,
        r: int = 0,
        lora_alpha: float = 1,
        lora_dropout: float = 0.0,
        fan_in_fan_out: bool = True,
        merge_weights: bool = True,
        *,
        rngs: nnx.Rngs,
        **kwargs: Any,
    ):
        if not fan_in_fan_out:
            kwargs["dot_general"] = _dot_out_in
        nnx.Linear.__init__(self, in_features, out_features, rngs=rngs, **kwargs)
        if not fan_in_fan_out:
            self.kernel.set_value(self.kernel[...].T)
        self.fan_in_fan_out = fan_in_fan_out
        _add_adapter(self, r, lora_alpha, lora_dropout, None, merge_weights, rngs)


class MergedLinear(Linear):
    """`nnx.Linear` of several layers in one, with an adapter on those that `enable_lora` says.

    `lora_A` is `[r·n, in]` and `lora_B` `[out/slices·n, r]` for n enabled slices.

    Args:
        in_features: As for `Linear`, as are the others that are not named here.
        enable_lora: A bool for each of the equal slices of the output, for example `[True, False, True]`
            for q and v of a fused q, k, v.

    Raises:
        InputError: For values out of range, and with `r > 0` where nothing is enabled.

    Example:
        >>> layer = MergedLinear(4, 9, r=2, enable_lora=[True, False, True], rngs=nnx.Rngs(0))
        >>> layer.lora_A.shape, layer.lora_B.shape
        ((4, 4), (6, 2))
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        r: int = 0,
        lora_alpha: float = 1,
        lora_dropout: float = 0.0,
        enable_lora: Sequence[bool] = (False,),
        fan_in_fan_out: bool = True,
        merge_weights: bool = True,
        *,
        rngs: nnx.Rngs,
        **kwargs: Any,
    ):
        super().__init__(in_features, out_features, fan_in_fan_out=fan_in_fan_out, rngs=rngs, **kwargs)
        self.enable_lora = tuple(enable_lora)
        _add_adapter(self, r, lora_alpha, lora_dropout, self.enable_lora, merge_weights, rngs)


class Embedding(LoRAEmbedding, nnx.Embed):
    """`nnx.Embed` with an adapter in `lora_A` `[r, vocab]` and `lora_B` `[features, r]`.

    Args:
        num_embeddings: How many rows the table has.
        embedding_dim: How long they are.
        r: As for `Linear`, as are the others that are not named here.
        **kwargs: Go to `nnx.Embed`.

    Raises:
        InputError: For values out of range.

    Example:
        >>> layer = Embedding(5, 3, r=2, rngs=nnx.Rngs(0))
        >>> layer.lora_A.shape, layer.lora_B.shape
        ((2, 5), (3, 2))
    """

    base_class = nnx.Embed

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        r: int = 0,
        lora_alpha: float = 1,
        merge_weights: bool = True,
        *,
        rngs: nnx.Rngs,
        **kwargs: Any,
    ):
        nnx.Embed.__init__(self, num_embeddings, embedding_dim, rngs=rngs, **kwargs)
        _add_adapter(self, r, lora_alpha, 0.0, None, merge_weights, rngs)


class _ConvNd(LoRAConv):
    base_class = nnx.Conv
    dimensions: ClassVar[int]

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        r: int = 0,
        lora_alpha: float = 1,
        lora_dropout: float = 0.0,
        merge_weights: bool = True,
        *,
        rngs: nnx.Rngs,
        **kwargs: Any,
    ):
        if not isinstance(kernel_size, int):
            raise InputError(
                f"kernel_size is {kernel_size}; expected one number, the side of the window, as in loralib"
            )
        self.conv = nnx.Conv(in_channels, out_channels, (kernel_size,) * self.dimensions, rngs=rngs, **kwargs)
        _add_adapter(self, r, lora_alpha, lora_dropout, None, merge_weights, rngs)

    @property
    def base(self) -> nnx.Conv:
        """The Flax layer that holds the weight."""
        return self.conv


class Conv1d(_ConvNd):
    """`nnx.Conv` over `[batch, length, channels]` as `conv`, with an adapter in `lora_A` and `lora_B`.

    The adapter's shapes are those of `LoraConv`.

    Args:
        in_channels: Size of the input's last axis.
        out_channels: Size of the output's.
        kernel_size: The side of the window.
        r: As for `Linear`, as are the others that are not named here.
        **kwargs: Go to `nnx.Conv`, with its names and defaults (`strides`, `padding="SAME"`,
            `kernel_dilation`, `feature_group_count`, `use_bias`).

    Raises:
        InputError: For values out of range, and for `lora_dropout`, which loralib's convolutions take and do
            not use.

    Example:
        >>> layer = Conv1d(4, 6, kernel_size=3, r=2, rngs=nnx.Rngs(0))
        >>> layer.lora_A.shape, layer.lora_B.shape
        ((6, 12), (6, 6))
    """

    dimensions = 1


class Conv2d(_ConvNd):
    """The same as `Conv1d` over `[batch, height, width, channels]`.

    Example:
        >>> layer = Conv2d(4, 6, kernel_size=3, r=2, rngs=nnx.Rngs(0))
        >>> layer.lora_A.shape, layer.lora_B.shape
        ((6, 12), (18, 6))
    """

    dimensions = 2


class Conv3d(_ConvNd):
    """The same as `Conv1d` over `[batch, depth, height, width, channels]`.

    Example:
        >>> layer = Conv3d(4, 6, kernel_size=3, r=2, rngs=nnx.Rngs(0))
        >>> layer.lora_A.shape, layer.lora_B.shape
        ((6, 36), (18, 6))
    """

    dimensions = 3


def _add_adapter(
    layer: LoRALayer,
    r: int,
    lora_alpha: float,
    lora_dropout: float,
    enable_lora: tuple[bool, ...] | None,
    merge_weights: bool,
    rngs: nnx.Rngs,
) -> None:
    layer.r, layer.lora_alpha, layer.merge_weights = r, lora_alpha, merge_weights
    if r:
        adapter = new_adapter(layer.base, Config(r, lora_alpha, lora_dropout, enable_lora), rngs.params())
        layer.set_adapter(adapter, rngs["dropout"].fork() if lora_dropout else None)


def _dot_out_in(x: Array, kernel: Array, dimension_numbers: object, **kwargs: Any) -> Array:
    """The product for a kernel `[out, in]`, for which `nnx.Linear` has no argument."""
    del dimension_numbers
    return jax.lax.dot_general(x, kernel, (((x.ndim - 1,), (1,)), ((), ())), **kwargs)
