"""The kinds of adapter, and the pytree that holds a model's adapters.

An adapter is a small pytree: its arrays are leaves, its scale and dropout static. The adapter of a
stacked layer holds stacked arrays, `[L, r, in]`; the model slices it as it slices the weights.

Each kind says what it adds to a layer (the call), and what the layer's weight becomes when base and
adapter are made one (`merged`, in float32) and parted again (`unmerged`).
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from phi3_jax.config import LoraConfig
from phi3_jax.model.layers import dropout, look_up


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

    def __call__(self, y: Array, x: Array, weight: Array, key: jax.Array | None = None) -> Array:
        del weight  # a plain update does not look at the base
        x = dropout(x.astype(self.lora_A.dtype), self.dropout, key)
        update = (x @ self.lora_A.T) @ self.lora_B.T
        return (y + update * self.scaling).astype(y.dtype)

    def merged(self, weight: Float[Array, "*stack out in"]) -> Float[Array, "*stack out in"]:
        """W + s · B A."""
        return weight.astype(jnp.float32) + self._delta()

    def unmerged(self, weight: Float[Array, "*stack out in"]) -> Float[Array, "*stack out in"]:
        """W - s · B A."""
        return weight.astype(jnp.float32) - self._delta()

    def _delta(self) -> Array:
        return self.scaling * _matmul(self.lora_B, self.lora_A)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LoraEmbedding:
    """E[ids] + s · A[:, ids]ᵀ Bᵀ; no dropout, as in PEFT and loralib.

    As in PEFT, A's column of the padding token gets no gradient.

    **Fields**: `lora_A` `[r, vocab]`, `lora_B` `[hidden, r]`, `scaling` (s).
    """

    lora_A: Float[Array, "r vocab"]
    lora_B: Float[Array, "hidden r"]
    scaling: float = field(metadata={"static": True})

    def __call__(self, rows: Array, ids: Array, padding_idx: int | None) -> Array:
        update = look_up(self.lora_A.T, ids, padding_idx) @ self.lora_B.T
        return (rows + update * self.scaling).astype(rows.dtype)

    def merged(self, weight: Float[Array, "vocab hidden"]) -> Float[Array, "vocab hidden"]:
        """E + s · (B A)ᵀ."""
        return weight.astype(jnp.float32) + self._delta()

    def unmerged(self, weight: Float[Array, "vocab hidden"]) -> Float[Array, "vocab hidden"]:
        """E - s · (B A)ᵀ."""
        return weight.astype(jnp.float32) - self._delta()

    def _delta(self) -> Array:
        return self.scaling * _matmul(self.lora_A.T, self.lora_B.T)


def _matmul(a: Array, b: Array) -> Array:
    # A weight is made once and used for ever: full precision, also on TPUs and with TF32.
    return jnp.matmul(a.astype(jnp.float32), b.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST)


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

    @classmethod
    def from_items(cls, items: Mapping[str, Any], config: LoraConfig) -> "Lora":
        """The reverse of `items()`: nests adapters by the parts of their dotted names."""
        adapters: dict[str, Any] = {}
        for name, adapter in items.items():
            *parents, last = name.split(".")
            level = adapters
            for parent in parents:
                level = level.setdefault(parent, {})
            level[last] = adapter
        return cls(adapters, config)

    def items(self) -> Iterator[tuple[str, Any]]:
        """(dotted module name, adapter) pairs: `("model.layers.mlp.down_proj", LoraLinear(...))`."""
        yield from _walk(self.adapters, "")


def _walk(tree: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from _walk(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value
