"""Where in the model numbers stop being finite: a micro-batch once more, module by module."""

from dataclasses import replace
from functools import partial
from typing import NoReturn

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from phi3_jax.data.batch import Batch
from phi3_jax.lora.tree import Lora
from phi3_jax.model import Phi3ForCausalLM
from phi3_jax.model.attention import without_cache
from phi3_jax.model.logits import adapted_logits
from phi3_jax.model.observer import Observer
from phi3_jax.model.products import precise
from phi3_jax.model.protocols import materialised
from phi3_jax.model.rope import rope_cos_sin
from phi3_jax.model.walk import Layer
from phi3_jax.objectives.cross_entropy import cross_entropy_sums
from phi3_jax.objectives.next_token import next_tokens, noisy_embeddings, split_noise_key
from phi3_jax.parallel.sharding import constrain
from phi3_jax.system.dotted import dotted, flat_items, nested, path_names

# The linear modules of a layer as the forward pass comes to them, and what makes the input of each.
MODULES = {
    "self_attn.qkv_proj": "input_layernorm",
    "self_attn.o_proj": "self_attn (attention)",
    "mlp.gate_up_proj": "post_attention_layernorm",
    "mlp.down_proj": "mlp (the activation function)",
}


class _Found(Exception):
    """The first thing that is not finite; the message says what."""


def find_nonfinite(
    model: Phi3ForCausalLM,
    lora: Lora | None,
    batch: Batch,
    dropout_key: PRNGKeyArray | None = None,
    *,
    neftune_alpha: float | None = None,
) -> str | None:
    """What is the first that is not finite in the forward pass, and if all of that is, in the backward pass.

    A base weight, an adapter's array or activations, with the name of the module; None where everything
    is finite. Layer by layer, without one compiled program for all: slow, and exact in its randomness.

    Args:
        model: the base.
        lora: the adapters, None for the base alone.
        batch: `[batch, seq]` with `positions`, `segment_ids` and `loss_mask`.
        dropout_key: as `loss_sums` takes it.
        neftune_alpha: likewise.

    Returns:
        What was found, in words.
    """
    try:
        with precise(model.dtype):
            _Walk(model.with_saved(lora), lora, batch, dropout_key, neftune_alpha).there_and_back()
    except _Found as found:
        return str(found)
    return None


def _found(what: str) -> NoReturn:
    raise _Found(what)


def _is_finite(x: Array) -> bool:
    return not jnp.issubdtype(x.dtype, jnp.inexact) or bool(jnp.isfinite(x).all())


def _largest(x: Array) -> str:
    return f"{float(jnp.max(jnp.abs(x)).astype(jnp.float32)):.3g} in {x.dtype}"


def _check_module(name: str, before: str, adapter: object, x: Array, weight: Array, y: Array, out: Array) -> None:
    """Looks at all that a linear module takes and gives; `before`, what makes its input."""
    if not _is_finite(x):
        _found(f"the activations that come out of {before}")
    if not _is_finite(weight):
        _found(f"the base weight {name}.weight")
    _check_adapter(adapter, name)
    if not _is_finite(y):
        _found(f"the activations that come out of {name} (its input is at most {_largest(x)})")
    if not _is_finite(out):
        _found(f"the activations that the adapter of {name} puts out (its input is at most {_largest(x)})")


def _check_adapter(adapter: object, name: str) -> None:
    for path, leaf in jax.tree_util.tree_leaves_with_path(adapter):
        if not _is_finite(leaf):
            _found(f"the adapter's {name}.{path_names(path)[-1]}")


class _Walk:
    """The forward pass of `Phi3Model` and the loss, one layer at a time, and back."""

    def __init__(
        self,
        model: Phi3ForCausalLM,
        lora: Lora | None,
        batch: Batch,
        key: PRNGKeyArray | None,
        neftune_alpha: float | None,
    ):
        self.model, self.lora, self.batch = model, lora, batch
        self.adapters = materialised(lora, "model")
        self.noise_key, self.key = split_noise_key(key, neftune_alpha)
        self.neftune_alpha = neftune_alpha
        self.stack = model.model.stack(self.adapters, self.key)
        segment_ids = constrain(jnp.asarray(batch["segment_ids"]), "batch", None)
        self.attend = without_cache(segment_ids, model.config.sliding_window, model.attention)

    def there_and_back(self) -> None:
        x, inputs = self._embed(), []
        positions, segment_ids = jnp.asarray(self.batch["positions"]), jnp.asarray(self.batch["segment_ids"])
        self.cos_sin = rope_cos_sin(self.model.config, positions, segment_ids, x.dtype)
        for index, layer in enumerate(self.stack):
            inputs.append(x)
            x = self._forward(f"model.layers.{index}", layer, x)
        gradient = self._loss(x)
        for index, x in reversed(list(enumerate(inputs))):
            gradient = self._backward(f"model.layers.{index}", self.stack[index], x, gradient)

    def _embed(self) -> Float[Array, "batch seq hidden"]:
        ids, name = jnp.asarray(self.batch["input_ids"]), "model.embed_tokens"
        rows = self.model.model.embed_tokens.weight[...][ids]
        if not _is_finite(rows):
            token = int(jnp.max(jnp.where(jnp.isfinite(rows).all(-1), -1, ids)))
            _found(f"the base weight {name}.weight, in the row of token {token}")
        _check_adapter(self.adapters.get("embed_tokens"), name)
        if self.noise_key is None:
            x = self.model.embed(ids, self.lora)
        else:
            x = noisy_embeddings(self.model, self.lora, self.batch, self.noise_key, self.neftune_alpha)
        if not _is_finite(x):
            _found(f"the activations that come out of {name}")
        return constrain(x, "batch", "seq", None)

    def _forward(self, name: str, layer: Layer, x: Array) -> Array:
        weights = dict(nnx.to_flat_state(layer.weights))
        for norm in ("input_layernorm", "post_attention_layernorm"):
            if not _is_finite(weights[norm, "weight"].get_value()):
                _found(f"the base weight {name}.{norm}.weight")
        adapters = dict(flat_items(layer.adapters))
        # Adapters of parts of a fused module come after the module itself.
        observers = {
            module: Observer(
                partial(
                    _check_module, f"{name}.{module}", f"{name}.{MODULES.get(module, module)}", adapters.get(module)
                ),
                adapters.get(module),
            )
            for module in dict.fromkeys([*MODULES, *adapters])
        }
        x, _ = replace(layer, adapters=nested(observers))(x, self.cos_sin, self.attend)
        if not _is_finite(x):
            _found(f"the activations that come out of {name}, summed up (at most its parts' own are finite)")
        return x

    def _loss(self, x: Array) -> Array:
        """Checks the end of the forward pass; the gradient of what the last layer puts out."""
        norm = self.model.model.norm
        if not _is_finite(norm.weight[...]):
            _found("the base weight model.norm.weight")
        targets, is_target = next_tokens(self.batch)
        head, adapters = self.model.head(self.lora)
        if not _is_finite(head):
            _found(f"the base weight {'model.embed_tokens' if self.model.lm_head is None else 'lm_head'}.weight")
        for name, adapter in adapters.items():
            _check_adapter(adapter, name)

        def total(x: Array) -> Array:
            return cross_entropy_sums(
                norm(x), head, targets, is_target, adjust=adapted_logits, adapters=adapters, key=self.key
            )[0]

        value, backward = jax.vjp(total, x)
        if not _is_finite(value):
            _found("the activations that come out of lm_head (the logits, or the loss)")
        gradient: Array
        (gradient,) = backward(jnp.ones_like(value))
        if not _is_finite(gradient):
            _found("in the backward pass, the gradient of what goes into lm_head")
        return gradient

    def _backward(self, name: str, layer: Layer, x: Array, gradient: Array) -> Array:
        field = "weights" if self.lora is None else "adapters"  # what trains

        def output(x: Array, trains: PyTree) -> Array:
            return replace(layer, **{field: trains})(x, self.cos_sin, self.attend)[0]

        _, backward = jax.vjp(output, x, getattr(layer, field))
        gradient, gradients = backward(gradient)
        leaves = [(dotted(path_names(path)), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(gradients)]
        order = list(MODULES)  # the last ones' gradients are the first to be known
        leaves.sort(
            key=lambda leaf: max((i for i, name in enumerate(order) if name in leaf[0]), default=0), reverse=True
        )
        for place, leaf in leaves:
            if not _is_finite(leaf):
                _found(f"in the backward pass, the gradient of {name}.{place}")
        if not _is_finite(gradient):
            _found(f"in the backward pass, the gradient of what goes into {name}")
        return gradient
