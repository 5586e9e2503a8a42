"""The kinds of adapter, and the pytree that holds a model's adapters.

An adapter is a small pytree: its arrays are leaves, its scale and dropout static. The adapter of a
stacked layer holds stacked arrays, `[L, r, in]`; the model slices it as it slices the weights.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from phi3_jax.config import LoraConfig


class Adapter(Protocol):
    """An adapter of a linear layer."""

    def __call__(
        self,
        y: Float[Array, "*batch out"],
        x: Float[Array, "*batch in"],
        weight: Float[Array, "out in"],
        key: PRNGKeyArray | None,
    ) -> Float[Array, "*batch out"]:
        """The layer's output, given the base's output `y` for the input `x`; dropout iff `key`."""
        ...

    def merged(self, weight: Float[Array, "*stack out in"]) -> Float[Array, "*stack out in"]:
        """The weight, in float32, of the plain layer that does what base and adapter do together."""
        ...


class EmbeddingAdapter(Protocol):
    """An adapter of an embedding table."""

    def __call__(
        self, rows: Float[Array, "batch seq hidden"], ids: Int[Array, "batch seq"]
    ) -> Float[Array, "batch seq hidden"]: ...

    def merged(self, weight: Float[Array, "vocab hidden"]) -> Float[Array, "vocab hidden"]: ...


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LoraLinear:
    """y + s · (dropout(x) Aᵀ) Bᵀ, computed in the adapter's own dtype as PEFT does.

    **Fields**: `lora_A` `[*stack, r, in]`, `lora_B` `[*stack, out, r]`, `scaling` (s), `dropout`.
    """

    lora_A: Float[Array, "*stack r in"]
    lora_B: Float[Array, "*stack out r"]
    scaling: float = field(metadata={"static": True})
    dropout: float = field(default=0.0, metadata={"static": True})

    def __call__(self, y: Array, x: Array, weight: Array, key: PRNGKeyArray | None = None) -> Array:
        del weight  # a plain update does not look at the base
        x = x.astype(self.lora_A.dtype)
        if key is not None and self.dropout > 0:
            keep = jax.random.bernoulli(key, 1 - self.dropout, x.shape)
            x = jnp.where(keep, x / (1 - self.dropout), 0)
        update = (x @ self.lora_A.T) @ self.lora_B.T
        return (y + update * self.scaling).astype(y.dtype)

    def merged(self, weight: Array) -> Array:
        update = self.lora_B.astype(jnp.float32) @ self.lora_A.astype(jnp.float32)
        return weight.astype(jnp.float32) + update * self.scaling


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LoraEmbedding:
    """E[ids] + s · A[:, ids]ᵀ Bᵀ; no dropout, as in PEFT and loralib.

    **Fields**: `lora_A` `[r, vocab]`, `lora_B` `[hidden, r]`, `scaling` (s).
    """

    lora_A: Float[Array, "r vocab"]
    lora_B: Float[Array, "hidden r"]
    scaling: float = field(metadata={"static": True})

    def __call__(self, rows: Array, ids: Array) -> Array:
        update = self.lora_A.T[ids] @ self.lora_B.T
        return (rows + update * self.scaling).astype(rows.dtype)

    def merged(self, weight: Array) -> Array:
        update = (self.lora_B.astype(jnp.float32) @ self.lora_A.astype(jnp.float32)).T
        return weight.astype(jnp.float32) + update * self.scaling


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Lora:
    """All adapters of a model.

    **Fields**: `adapters`, nested mappings that mirror the model's modules (the layer index left
    out, since layers are stacked), for example
    `{"model": {"layers": {"self_attn": {"qkv_proj": LoraLinear(...)}}}}`; `config`, the
    configuration they were made from, which saving writes down.
    """

    adapters: dict[str, Any]
    config: LoraConfig = field(metadata={"static": True})

    def items(self) -> Iterator[tuple[str, Any]]:
        """(dotted module name, adapter) pairs: `("model.layers.mlp.down_proj", LoraLinear(...))`."""
        yield from _walk(self.adapters, "")


def _walk(tree: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from _walk(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value
