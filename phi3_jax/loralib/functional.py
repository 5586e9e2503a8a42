"""Adapters beside any Flax model: made, applied, read off again and merged, without a change to it."""

import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import TypeVar

import jax
from flax import nnx
from jaxtyping import Array, PRNGKeyArray

from phi3_jax.loralib.adapted import LoRALayer, adapted_class, become_adapted
from phi3_jax.loralib.kernels import AdaptableLayer, layer_kernel, to_kernel, to_weight, weight_name, weight_shape
from phi3_jax.loralib.own_adapters import Config, LayerAdapter, new_adapter
from phi3_jax.system.dotted import dotted
from phi3_jax.system.errors import InputError
from phi3_jax.system.expressions import check_expression, matches

Adapters = dict[str, LayerAdapter]  # dotted name of a layer -> its adapter
Model = TypeVar("Model", bound=nnx.Module)


def init(model: nnx.Module, patterns: Mapping[str, Config], key: PRNGKeyArray) -> Adapters:
    """Fresh adapters for the layers that the patterns name, as a pytree: they add nothing yet.

    Args:
        model: Any; abstract ones (`nnx.eval_shape`) too. Layers of the kinds `nnx.Linear`,
            `nnx.LinearGeneral`, `nnx.Embed` and `nnx.Conv`, and subclasses, can have an adapter.
        patterns: Regular expressions for a layer's dotted name (`"encoder.*"`) or its last parts
            (`"query|value"`). Of several that match, the first counts, as in PEFT's `rank_pattern`.
        key: A layer's numbers depend on it and on the layer's name, not on the other layers.

    Returns:
        `{"encoder.layers.0.attention.query": LoraLinear(...), ...}`.

    Raises:
        InputError: Where a pattern finds no layer, and for a `Config` that does not suit one.

    Example:
        >>> import phi3_jax.loralib as lora
        >>> model = nnx.List([nnx.Embed(5, 4, rngs=nnx.Rngs(0)), nnx.Linear(4, 3, rngs=nnx.Rngs(0))])
        >>> adapters = lora.init(model, {"1": lora.Config(r=2)}, jax.random.key(0))
        >>> {name: (adapter.lora_A.shape, adapter.lora_B.shape) for name, adapter in adapters.items()}
        {'1': ((2, 4), (3, 2))}
    """
    layers = dict(adaptable_layers(model))
    adapters: Adapters = {}
    for pattern, config in patterns.items():
        check_expression("the pattern", pattern)
        names = [name for name in layers if matches("the pattern", rf"(.*\.)?({pattern})", name)]
        free = [name for name in names if name not in adapters]
        if not free:
            why = "only layers that an earlier pattern took" if names else "no layer that can have an adapter"
            raise InputError(f"the pattern {pattern!r} matches {why}; the model has {_shown(layers)}")
        for name in free:
            # A checksum, since Python's own hash of a string differs from run to run.
            layer_key = jax.random.fold_in(key, zlib.crc32(name.encode()))
            try:
                adapters[name] = new_adapter(layers[name], config, layer_key)
                _check_dropout(layers[name], adapters[name])
            except InputError as error:
                raise InputError(f"{name} (pattern {pattern!r}): {error}") from error
    return dict(sorted(adapters.items()))


def apply(model: Model, adapters: Adapters, key: PRNGKeyArray | None = None) -> Model:
    """A model of the same type that computes with the adapters; `model` itself stays as it is.

    To be called where gradients are taken: the result is differentiable in `adapters`. Its layers
    are subclasses of what they were and hold the adapters' arrays as `LoraParam`; weights are shared
    with `model`.

    Args:
        model: The base.
        adapters: See `init`.
        key: For dropout on the adapters' inputs, another for each layer; None: no dropout.

    Raises:
        InputError: For adapters that have no layer, or do not fit theirs.

    Example:
        >>> import phi3_jax.loralib as lora
        >>> model, x = nnx.Linear(4, 3, rngs=nnx.Rngs(0)), jax.numpy.ones((1, 4))
        >>> adapters = lora.init(model, {".*": lora.Config(r=2)}, jax.random.key(0))
        >>> grads = jax.grad(lambda adapters: lora.apply(model, adapters)(x).sum())(adapters)
        >>> grads[""].lora_B.shape  # the layer is the whole model here, and has no name
        (3, 2)
    """
    adapted = nnx.clone(model)
    layers = dict(adaptable_layers(adapted))
    for number, (name, adapter) in enumerate(sorted(adapters.items())):
        layer = _layer(layers, name, adapter)
        dropout_key = _dropout_key(key, number, layer)
        become_adapted(layer).set_adapter(adapter, dropout_key)
    return adapted


def extract(model: nnx.Module) -> Adapters:
    """The adapters of a model that holds some, made by `apply` or of loralib's layers: the reverse of `apply`.

    Args:
        model: Stays as it is.

    Example:
        >>> import phi3_jax.loralib as lora
        >>> list(lora.extract(nnx.List([lora.Linear(4, 3, r=2, rngs=nnx.Rngs(0))])))
        ['0']
    """
    layers = {dotted(path): module for path, module in nnx.iter_modules(model) if isinstance(module, LoRALayer)}
    found = {name: layer.adapter() for name, layer in sorted(layers.items())}
    return {name: adapter for name, adapter in found.items() if adapter is not None}


def merge(model: Model, adapters: Adapters) -> Model:
    """A plain model that computes what `model` does with the adapters; `model` itself stays as it is.

    Computed in float32 and rounded once to the weight's type. Weights without an adapter are shared.

    Args:
        model: The base.
        adapters: See `init`.

    Raises:
        InputError: As `apply` does.

    Example:
        >>> import phi3_jax.loralib as lora
        >>> model, x = nnx.Linear(4, 3, rngs=nnx.Rngs(0)), jax.numpy.ones((1, 4))
        >>> adapters = lora.init(model, {".*": lora.Config(r=2)}, jax.random.key(0))
        >>> bool((lora.merge(model, adapters)(x) == model(x)).all())  # fresh adapters add nothing
        True
    """
    return _with_weights(model, adapters, lambda adapter, weight: adapter.merged(weight))


def unmerge(model: Model, adapters: Adapters) -> Model:
    """Takes the adapters out of a merged model: the base but for rounding. `model` stays as it is.

    Args:
        model: What `merge` gave.
        adapters: What was merged into it.

    Example:
        >>> import phi3_jax.loralib as lora
        >>> model, x = nnx.Linear(4, 3, rngs=nnx.Rngs(0)), jax.numpy.ones((1, 4))
        >>> adapters = lora.init(model, {".*": lora.Config(r=2)}, jax.random.key(0))
        >>> again = lora.unmerge(lora.merge(model, adapters), adapters)
        >>> bool((abs(again(x) - model(x)) < 1e-6).all())
        True
    """
    return _with_weights(model, adapters, lambda adapter, weight: adapter.unmerged(weight))


def adaptable_layers(model: nnx.Module) -> Iterator[tuple[str, AdaptableLayer]]:
    """(dotted name, layer) of all layers that can have an adapter and have none, sorted by name."""
    modules = {dotted(path): module for path, module in nnx.iter_modules(model)}
    adapted = {id(layer.base) for layer in modules.values() if isinstance(layer, LoRALayer) and layer.adapter_kind}
    for name, module in sorted(modules.items()):
        if isinstance(module, AdaptableLayer) and id(module) not in adapted:
            yield name, module


def _with_weights(model: Model, adapters: Adapters, change: Callable[[LayerAdapter, Array], Array]) -> Model:
    changed = nnx.clone(model)
    layers = dict(adaptable_layers(changed))
    for name, adapter in adapters.items():
        layer = _layer(layers, name, adapter)
        kernel = layer_kernel(layer)
        weight = to_kernel(layer, change(adapter, to_weight(layer, kernel))).astype(kernel.dtype)
        # A new variable: another layer may share the old one, without the adapter.
        variable = getattr(layer, weight_name(layer))
        setattr(layer, weight_name(layer), variable.replace(weight))
    return changed


def _layer(layers: Mapping[str, AdaptableLayer], name: str, adapter: LayerAdapter) -> AdaptableLayer:
    if name not in layers:
        raise InputError(
            f"there is an adapter for {name}, but no layer of that name without one; the model has {_shown(layers)}"
        )
    _check_dropout(layers[name], adapter)
    stack, shape = weight_shape(layers[name])
    expected = (*stack, *shape)
    weight = jax.ShapeDtypeStruct(expected, "float32")
    try:
        found = jax.eval_shape(lambda adapter, weight: adapter.merged(weight), adapter, weight).shape
    except (TypeError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        found = None
    if found != expected:
        shapes = {entry: value.shape for entry, value in vars(adapter).items() if hasattr(value, "shape")}
        raise InputError(
            f"the adapter of {name} {shapes} does not fit its weight {list(expected)}; it is another model's"
        )
    return layers[name]


def _check_dropout(layer: AdaptableLayer, adapter: LayerAdapter) -> None:
    if isinstance(layer, LoRALayer) or not getattr(adapter, "dropout", None):
        return
    if adapted_class(layer.__class__).acts_in_weight:
        kind = type(layer).__name__
        raise InputError(f"{kind} computes in a way of its own, in which lora_dropout has no place; leave it out there")


def _dropout_key(key: PRNGKeyArray | None, number: int, layer: AdaptableLayer) -> nnx.RngKey | None:
    if key is None:
        return None
    stack, _ = weight_shape(layer)
    key = jax.random.fold_in(key, number)
    return nnx.RngKey(jax.random.split(key, stack) if stack else key, tag="dropout")


def _shown(names: Mapping[str, object]) -> str:
    return ", ".join(names) or "none"
