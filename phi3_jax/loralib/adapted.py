"""Layers that carry their adapter: loralib's, and any Flax layer that `apply` gives one.

A layer's base weight is never written to. `eval()` keeps the merged weight beside it and `train()`
drops that again, so merging any number of times, before and after saving, comes to the same.
"""

import functools
from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any, ClassVar, TypeAlias

import jax
from flax import nnx
from jaxtyping import Array, Float

from phi3_jax.loralib.kernels import AdaptableLayer, features, layer_kernel, to_kernel, to_weight, weight_name
from phi3_jax.loralib.own_adapters import LayerAdapter


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


def _array_names(adapter: LayerAdapter) -> list[str]:
    return [entry.name for entry in fields(adapter) if not entry.metadata.get("static")]


def _merged_kernel(layer: AdaptableLayer, adapter: LayerAdapter) -> Array:
    kernel = layer_kernel(layer)
    return to_kernel(layer, adapter.merged(to_weight(layer, kernel))).astype(kernel.dtype)


def _join(x: Array, axes: int) -> Float[Array, "*batch features"]:
    """x with its last axes in one."""
    return x.reshape(*x.shape[: x.ndim - axes], -1)
