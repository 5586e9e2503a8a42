"""Where in the model numbers stop being finite: a micro-batch once more, module by module."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, PRNGKeyArray

from phi3_jax.lora.tree import Lora
from phi3_jax.model import Phi3ForCausalLM
from phi3_jax.model.attention import attend
from phi3_jax.model.phi3 import adapted_logits, precise
from phi3_jax.model.rope import rope_cos_sin
from phi3_jax.objectives.cross_entropy import cross_entropy_sums
from phi3_jax.objectives.next_token import neftune_noise, next_tokens
from phi3_jax.parallel.sharding import constrain
from phi3_jax.system.dotted import dotted, flat_items, nested, path_names

Batch = Mapping[str, Int[Array, "batch seq"]]

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

    **Arguments**: as `training.loss.loss_sums` has them; `batch` `[batch, seq]` with `positions`,
    `segment_ids` and `loss_mask`.
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


@dataclass(frozen=True)
class _Probe:
    """In an adapter's place: looks at all that a linear module takes and gives. **Fields**: `adapter`, the
    real one, None without; `name`, the module's; `before`, what makes its input."""

    adapter: Any
    name: str
    before: str

    def __call__(self, y: Array, x: Array, weight: Array, key: PRNGKeyArray | None = None) -> Array:
        if not _is_finite(x):
            _found(f"the activations that come out of {self.before}")
        if not _is_finite(weight):
            _found(f"the base weight {self.name}.weight")
        _check_adapter(self.adapter, self.name)
        if not _is_finite(y):
            _found(f"the activations that come out of {self.name} (its input is at most {_largest(x)})")
        out = y if self.adapter is None else self.adapter(y, x, weight, key)
        if not _is_finite(out):
            _found(f"the activations that the adapter of {self.name} puts out (its input is at most {_largest(x)})")
        return out

    def part(self, rows: slice) -> "_Probe":
        part = None if self.adapter is None else self.adapter.part(rows)
        return _Probe(part, self.name, self.before)


def _check_adapter(adapter: Any, name: str) -> None:
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
        self.adapters = {} if lora is None else lora.materialise()
        # As `loss_sums` and the model draw them.
        self.noise_key: PRNGKeyArray | None = None
        self.key = key
        if key is not None and neftune_alpha:
            self.noise_key, self.key = jax.random.split(key)
        self.neftune_alpha = neftune_alpha
        layers = model.config.num_hidden_layers
        self.keys = [None] * layers if self.key is None else list(jax.random.split(self.key, layers))
        self.graph, self.weights = nnx.split(model.model.layers)

    def there_and_back(self) -> None:
        x, inputs = self._embed(), []
        self.cos_sin = rope_cos_sin(self.model.config, self.batch["positions"], self.batch["segment_ids"], x.dtype)
        for index in range(self.model.config.num_hidden_layers):
            inputs.append(x)
            x = self._forward(index, x)
        gradient = self._loss(x)
        for index in reversed(range(len(inputs))):
            gradient = self._backward(index, inputs[index], gradient)

    def _embed(self) -> Float[Array, "batch seq hidden"]:
        ids, name = jnp.asarray(self.batch["input_ids"]), "model.embed_tokens"
        rows = self.model.model.embed_tokens.weight[...][ids]
        if not _is_finite(rows):
            token = int(jnp.max(jnp.where(jnp.isfinite(rows).all(-1), -1, ids)))
            _found(f"the base weight {name}.weight, in the row of token {token}")
        _check_adapter(self.adapters.get("model", {}).get("embed_tokens"), name)
        x = self.model.embed(ids, self.lora)
        if self.noise_key is not None and self.neftune_alpha:
            noise = neftune_noise(self.noise_key, self.batch["segment_ids"], x.shape[-1], self.neftune_alpha)
            x += noise.astype(x.dtype)
        if not _is_finite(x):
            _found(f"the activations that come out of {name}")
        return constrain(x, "batch", "seq", None)

    def _layer(self, index: int, adapters: Any, x: Array, weights: Any) -> Array:
        """One layer, as in `Phi3Model`."""
        config, segment_ids = self.model.config, constrain(self.batch["segment_ids"], "batch", None)

        def attend_here(q: Array, k: Array, v: Array) -> tuple[Array, None]:
            kind = self.model.attention
            return attend(q, k, v, segment_ids, sliding_window=config.sliding_window, kind=kind), None

        out: Array = nnx.merge(self.graph, weights)(x, self.cos_sin, attend_here, adapters, self.keys[index])[0]
        return out

    def _sliced(self, index: int) -> tuple[dict[str, Any], Any]:
        """A layer's adapters, by module name, and its weights."""
        adapters = self.adapters.get("model", {}).get("layers", {})
        own = {name: jax.tree.map(lambda x: x[index], adapter) for name, adapter in flat_items(adapters)}
        return own, jax.tree.map(lambda x: x[index], self.weights)

    def _forward(self, index: int, x: Array) -> Array:
        layer = f"model.layers.{index}"
        adapters, weights = self._sliced(index)
        for name in ("input_layernorm", "post_attention_layernorm"):
            if not _is_finite(weights[name]["weight"].get_value()):
                _found(f"the base weight {layer}.{name}.weight")
        # Adapters of parts of a fused module come after the module itself.
        names = dict.fromkeys([*MODULES, *adapters])
        befores = {name: f"{layer}.{MODULES[name]}" if name in MODULES else f"{layer}.{name}" for name in names}
        probes = {name: _Probe(adapters.get(name), f"{layer}.{name}", befores[name]) for name in names}
        x = self._layer(index, nested(probes), x, weights)
        if not _is_finite(x):
            _found(f"the activations that come out of {layer}, summed up (at most its parts' own are finite)")
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
        (gradient,) = backward(jnp.ones_like(value))
        if not _is_finite(gradient):
            _found("in the backward pass, the gradient of what goes into lm_head")
        return gradient

    def _backward(self, index: int, x: Array, gradient: Array) -> Array:
        layer = f"model.layers.{index}"
        adapters, weights = self._sliced(index)
        trains = nested(adapters) if self.lora is not None else weights

        def output(x: Array, trains: Any) -> Array:
            return (
                self._layer(index, trains, x, weights) if self.lora is not None else self._layer(index, {}, x, trains)
            )

        _, backward = jax.vjp(output, x, trains)
        gradient, gradients = backward(gradient)
        leaves = [(dotted(path_names(path)), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(gradients)]
        order = list(MODULES)  # the last ones' gradients are the first to be known
        leaves.sort(
            key=lambda leaf: max((i for i, name in enumerate(order) if name in leaf[0]), default=0), reverse=True
        )
        for name, leaf in leaves:
            if not _is_finite(leaf):
                _found(f"in the backward pass, the gradient of {layer}.{name}")
        if not _is_finite(gradient):
            _found(f"in the backward pass, the gradient of what goes into {layer}")
        return gradient
