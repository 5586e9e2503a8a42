"""Layers that carry their adapter: loralib's, and any Flax layer that `apply` gives one.

A layer's base weight is never written to. `eval()` keeps the merged weight beside it and `train()`
drops that again, so merging any number of times, before and after saving, comes to the same.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from typing import Any, ClassVar, TypeAlias

import jax
from flax import nnx
from jaxtyping import Array, Float

from phi3_jax.loralib.kernels import AdaptableLayer, features, layer_kernel, to_kernel, to_weight, weight_name
from phi3_jax.loralib.own_adapters import Config, LayerAdapter, new_adapter
from phi3_jax.system.errors import InputError


class LoraParam(nnx.Variable[Array]):
    """An array of an adapter. No `nnx.Param`: a filter for those finds the base alone."""


class MergedWeight(nnx.Variable[Array]):
    """The base weight with the adapter in it, which a layer in evaluation mode computes with."""


DropoutKeys: TypeAlias = nnx.RngStream | nnx.RngKey  # a key a call, or the one there is


class LoRALayer(nnx.Module):
    """What all layers with an adapter share.

    The adapter's arrays are attributes of the layer, of type `LoraParam`; the rest of it is `adapter_kind`.
    These defaults are the class's, since `apply` turns existing layers into such ones.
    """

    base_class: ClassVar[type[AdaptableLayer]]  # computes without an adapter
    acts_in_weight: ClassVar[bool] = False  # or beside the layer's output, by low-rank products
    r: int
    lora_alpha: float
    adapter_kind: LayerAdapter | None = None
    merge_weights = True
    dropout_keys: DropoutKeys | None = None
    _deterministic = False

    def __call__(self, inputs: Array, *args: Any, **kwargs: Any) -> Array:
        return self._compute("__call__", self._added, inputs, *args, **kwargs)

    @property
    def base(self) -> AdaptableLayer:
        """The Flax layer that holds the weight."""
        assert isinstance(self, AdaptableLayer)  # a subclass that is none says which it holds
        return self

    def adapter(self) -> LayerAdapter | None:
        """The adapter as a pytree, None with `r=0`."""
        if self.adapter_kind is None:
            return None
        names = _array_names(self.adapter_kind)
        arrays: dict[str, Any] = {name: getattr(self, name)[...] for name in names if name in vars(self)}
        return replace(self.adapter_kind, **arrays)

    def set_adapter(self, adapter: LayerAdapter, dropout_keys: DropoutKeys | None = None) -> None:
        """Makes `adapter` the layer's own; without `dropout_keys` there is no dropout."""
        arrays = {name: getattr(adapter, name) for name in _array_names(adapter)}
        for name, array in arrays.items():
            if array is not None:
                setattr(self, name, LoraParam(array))
        without: dict[str, Any] = dict.fromkeys(arrays)
        self.adapter_kind = nnx.static(replace(adapter, **without))
        self.dropout_keys = nnx.data(dropout_keys)

    @property
    def merged(self) -> bool:
        """Whether the layer computes with base and adapter in one weight."""
        return self.deterministic and "merged_weight" in vars(self)

    @property
    def deterministic(self) -> bool:
        """True in evaluation mode, as `eval()` and `train()` of any module above set it.

        Setting it to True merges, unless `merge_weights` is False; again after a change of parameters
        it merges anew.
        """
        return self._deterministic

    @deterministic.setter
    def deterministic(self, value: bool) -> None:
        self._deterministic = value
        adapter = self.adapter()
        if value and self.merge_weights and adapter is not None:
            self.merged_weight = MergedWeight(_merged_kernel(self.base, adapter))
        elif "merged_weight" in vars(self):
            del self.merged_weight

    def set_view(self, deterministic: bool | None = None) -> None:
        """What `nnx.view` calls."""
        if deterministic is not None:
            self.deterministic = deterministic

    def _added(self, adapter: Any, y: Array, inputs: Array) -> Array:
        """The layer's output with the adapter, given the base's output `y`."""
        raise NotImplementedError

    def _compute(self, method: str, added: Callable[..., Array], inputs: Array, *args: Any, **kwargs: Any) -> Array:
        """A method of the base class, in the state that the layer is in."""
        adapter = None if self.merged else self.adapter()
        run: Callable[..., Array]
        if self.merged:
            run = getattr(self._with_kernel(self.merged_weight[...]), method)
        elif adapter is not None and self.acts_in_weight:
            run, adapter = getattr(self._with_kernel(_merged_kernel(self.base, adapter)), method), None
        elif isinstance(self, AdaptableLayer):
            run = functools.partial(getattr(self.base_class, method), self)
        else:
            run = getattr(self.base, method)
        y = run(inputs, *args, **kwargs)
        return y if adapter is None else added(adapter, y, inputs)

    def _with_kernel(self, kernel: Array) -> AdaptableLayer:
        """The plain layer with another weight: a copy, since JAX may be tracing the call of this one."""
        plain = object.__new__(self.base_class)
        vars(plain).update(vars(self.base))
        vars(plain)[weight_name(self.base)] = nnx.Param(kernel)
        return plain


class LoRALinear(LoRALayer):
    """A linear layer of any number of input and output axes."""

    def _added(self, adapter: Any, y: Array, inputs: Array) -> Array:
        assert isinstance(self.base, nnx.Linear | nnx.LinearGeneral)
        ins, outs = features(self.base)
        weight = to_weight(self.base, layer_kernel(self.base))
        adapted: Array = adapter(_join(y, len(outs)), _join(inputs, len(ins)), weight, self._dropout_key())
        return adapted.reshape(y.shape)

    def _dropout_key(self) -> jax.Array | None:
        if self.deterministic or self.dropout_keys is None:
            return None
        return self.dropout_keys() if isinstance(self.dropout_keys, nnx.RngStream) else self.dropout_keys[...]


class LoRAEmbedding(LoRALayer):
    """A table of vectors."""

    def _added(self, adapter: Any, y: Array, inputs: Array) -> Array:
        adapted: Array = adapter(y, inputs, layer_kernel(self.base), None)
        return adapted

    def attend(self, query: Float[Array, "*batch features"], *args: Any, **kwargs: Any) -> Float[Array, "*batch vocab"]:
        """query Eᵀ with the adapter in the table E."""
        return self._compute("attend", self._added_scores, query, *args, **kwargs)

    def _added_scores(self, adapter: Any, scores: Array, query: Array) -> Array:
        update = (query.astype(adapter.lora_B.dtype) @ adapter.lora_B) @ adapter.lora_A
        adapted: Array = scores + update * adapter.scaling
        return adapted.astype(scores.dtype)


class LoRAConv(LoRALayer):
    """A convolution in any number of dimensions, channels last."""

    acts_in_weight = True


@functools.cache
def adapted_class(base_class: type[AdaptableLayer]) -> type[LoRALayer]:
    """The class that a layer of `base_class` turns into when it gets an adapter: a subclass of it.

    Always the same one, since compiled functions know a model by its classes. A class that computes
    in a way of its own gets the adapter in its weight, wherever it uses that.
    """
    kinds: dict[type[AdaptableLayer], type[LoRALayer]] = {
        nnx.Linear: LoRALinear,
        nnx.LinearGeneral: LoRALinear,
        nnx.Embed: LoRAEmbedding,
        nnx.Conv: LoRAConv,
    }
    flax_class, ours = next((flax, kind) for flax, kind in kinds.items() if issubclass(base_class, flax))
    methods = [name for name in ("__call__", "attend") if hasattr(flax_class, name)]
    has_own_way = any(getattr(base_class, name) is not getattr(flax_class, name) for name in methods)
    attributes = {"base_class": base_class, "acts_in_weight": ours.acts_in_weight or has_own_way}
    return type(f"LoRA{base_class.__name__}", (ours, base_class), attributes)


def become_adapted(layer: Any) -> LoRALayer:
    """The layer itself, turned into the class that `adapted_class` makes of its own."""
    if not isinstance(layer, LoRALayer):
        layer.__class__ = adapted_class(layer.__class__)
    adapted: LoRALayer = layer
    return adapted


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


def _array_names(adapter: LayerAdapter) -> list[str]:
    return [entry.name for entry in fields(adapter) if not entry.metadata.get("static")]


def _merged_kernel(layer: AdaptableLayer, adapter: LayerAdapter) -> Array:
    kernel = layer_kernel(layer)
    return to_kernel(layer, adapter.merged(to_weight(layer, kernel))).astype(kernel.dtype)


def _join(x: Array, axes: int) -> Float[Array, "*batch features"]:
    """x with its last axes in one."""
    return x.reshape(*x.shape[: x.ndim - axes], -1)


def _dot_out_in(x: Array, kernel: Array, dimension_numbers: object, **kwargs: Any) -> Array:
    """The product for a kernel `[out, in]`, for which `nnx.Linear` has no argument."""
    del dimension_numbers
    return jax.lax.dot_general(x, kernel, (((x.ndim - 1,), (1,)), ((), ())), **kwargs)
