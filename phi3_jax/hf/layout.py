"""Which tensors a checkpoint has, and where in the model each of them goes."""

from dataclasses import dataclass
from functools import lru_cache

from phi3_jax.config.model import Phi3Config
from phi3_jax.hf.safetensors_io import FLOATS
from phi3_jax.model.leaves import LeafPath, abstract_model, model_leaves

HEAD, EMBEDDING = "lm_head.weight", ("model", "embed_tokens", "weight")


@dataclass(frozen=True)
class LayoutEntry:
    """A tensor on disk, and its place in the model's state: all of the array at `path`, or a layer."""

    name: str
    shape: tuple[int, ...]
    path: LeafPath
    layer: int | None


@dataclass(frozen=True)
class Expected:
    """What a file must hold under a name.

    Attributes:
        shape: None for a vector of any length.
        dtypes: Any of these.
        optional: It may be left out.
    """

    shape: tuple[int, ...] | None
    dtypes: tuple[str, ...] = tuple(FLOATS)
    optional: bool = False


@lru_cache(maxsize=4)
def checkpoint_layout(config: Phi3Config) -> tuple[LayoutEntry, ...]:
    """Every tensor of such a model's checkpoint, in the order of the layers."""
    outer, layers = [], []
    for path, leaf in model_leaves(abstract_model(config)).items():
        if path[:2] == ("model", "layers"):
            inner = ".".join(path[2:])
            layers += [LayoutEntry(f"model.layers.{i}.{inner}", leaf.shape[1:], path, i) for i in range(leaf.shape[0])]
        else:
            outer.append(LayoutEntry(".".join(path), leaf.shape, path, None))
    layers.sort(key=lambda entry: entry.layer or 0)
    outer.sort(key=lambda entry: entry.path != EMBEDDING)
    return (*outer[:1], *layers, *outer[1:])
