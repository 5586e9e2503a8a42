"""Which tensors a checkpoint has, and where in the model each of them goes."""

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from flax import nnx

from phi3_jax.config.model import Phi3Config
from phi3_jax.hf.safetensors_io import FLOATS
from phi3_jax.model.phi3 import Phi3ForCausalLM

HEAD, EMBEDDING = "lm_head.weight", ("model", "embed_tokens", "weight")


@dataclass(frozen=True)
class Slot:
    """A tensor on disk, and its place in the model's state: all of the array at `path`, or a layer."""

    name: str
    shape: tuple[int, ...]
    path: tuple[str, ...]
    layer: int | None


@dataclass(frozen=True)
class Expected:
    """What a file must hold under a name. **Fields**: `shape`, None for a vector of any length; `dtypes`, any
    of these; `optional`, that it may be left out."""

    shape: tuple[int, ...] | None
    dtypes: tuple[str, ...] = tuple(FLOATS)
    optional: bool = False


def abstract_model(config: Phi3Config, dtype: Any = jnp.float32, attention: str = "auto") -> Phi3ForCausalLM:
    """The model with shapes in place of arrays."""
    return nnx.eval_shape(lambda: Phi3ForCausalLM(config, dtype=dtype, rngs=nnx.Rngs(0), attention=attention))


def model_leaves(model: Phi3ForCausalLM) -> dict[tuple[str, ...], nnx.Variable]:
    """The variables of a model's state, by path."""
    return {tuple(map(str, path)): leaf for path, leaf in nnx.to_flat_state(nnx.state(model))}


def checkpoint_slots(config: Phi3Config) -> list[Slot]:
    """Every tensor of such a model's checkpoint, in the order of the layers."""
    outer, layers = [], []
    for path, leaf in model_leaves(abstract_model(config)).items():
        if path[:2] == ("model", "layers"):
            inner = ".".join(path[2:])
            layers += [Slot(f"model.layers.{i}.{inner}", leaf.shape[1:], path, i) for i in range(leaf.shape[0])]
        else:
            outer.append(Slot(".".join(path), leaf.shape, path, None))
    layers.sort(key=lambda slot: slot.layer or 0)
    outer.sort(key=lambda slot: slot.path != EMBEDDING)
    return [*outer[:1], *layers, *outer[1:]]
