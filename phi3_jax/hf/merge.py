"""A checkpoint merged with an adapter, from file to file: one tensor in memory at a time."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from phi3_jax.hf.checkpoint import Checkpoint
from phi3_jax.hf.finite import is_finite, read_finite
from phi3_jax.hf.layout import EMBEDDING, HEAD, LayoutEntry, checkpoint_layout
from phi3_jax.hf.safetensors_io import TensorEntry, TensorSource, read_tensor
from phi3_jax.hf.save import config_json, write_checkpoint
from phi3_jax.lora.adapters import AnyAdapter
from phi3_jax.lora.merge import Parts, merge_plan, merged_tensor, not_finite
from phi3_jax.lora.tree import Lora
from phi3_jax.system.errors import InputError


def save_merged(
    checkpoint: Checkpoint, lora: Lora, folder: Path, *, dtype: str | None = None, max_shard_size: int = 5 * 10**9
) -> None:
    """Writes a checkpoint in which `lora` is part of the weights. No model is loaded for it.

    A weight is read as it is stored, changed in float32 and rounded once, to the type written.

    Args:
        checkpoint: The base, not quantised.
        lora: The adapter.
        folder: Where to.
        dtype: Type of the weights written; None for that of the base.
        max_shard_size: Bytes of a file at most.

    Raises:
        InputError: Where the base cannot be read or is quantised, for adapters that no weight can hold (`lora_bias`),
            and naming a tensor that becomes NaN or infinite.
        StorageError: Where it cannot be written.
    """
    checkpoint.check_unquantized(
        "and merged ones would be rounded again", "give the unquantised checkpoint with --base"
    )
    kind = np.dtype(jnp.dtype(dtype or checkpoint.stored_dtype))
    model, changes = merge_plan(checkpoint.shapes, lora)
    merging = _Merging(checkpoint, lora, changes, kind)
    tensors = [
        [TensorSource(entry.name, kind, entry.shape, partial(merging.tensor, entry))]
        for entry in checkpoint_layout(model.config)
    ]
    write_checkpoint(
        folder,
        tensors,
        config_json(model.config, kind.name),
        generation=model.config.generation,
        max_shard_size=max_shard_size,
    )


T = TypeVar("T", bound=AnyAdapter | jax.Array)


@dataclass(frozen=True)
class _Merging:
    """Where each tensor comes from, and what becomes of it."""

    checkpoint: Checkpoint
    lora: Lora
    changes: Parts
    dtype: np.dtype

    def tensor(self, entry: LayoutEntry) -> np.ndarray:
        """The tensor as it is written."""
        name = ".".join(entry.path[:-1])
        parts = [(rows, _of_layer(adapter, entry.layer)) for rows, adapter in self.changes.get(name, ())]
        saved = self.lora.saved.get(name)
        if saved is not None:
            result = self._rounded(merged_tensor(parts, np.array(_of_layer(saved, entry.layer), np.float32)))
        elif parts:
            wide = np.empty(entry.shape, np.float32)
            read_finite(self._stored(entry), wide)
            result = self._rounded(merged_tensor(parts, wide))
        else:
            result = np.empty(entry.shape, self.dtype)
            with np.errstate(over="ignore"):
                read_tensor(self._stored(entry), result)
        if not is_finite(result):
            raise InputError(not_finite(entry.name, self.dtype.name))
        return result

    def _rounded(self, wide: Float[np.ndarray, "*shape"]) -> np.ndarray:
        with np.errstate(over="ignore"):
            return wide.astype(self.dtype)

    def _stored(self, entry: LayoutEntry) -> TensorEntry:
        tensors = self.checkpoint.weights.tensors
        # A head that the base shares with its embedding.
        is_table = entry.name == HEAD and self.checkpoint.config.tie_word_embeddings
        return tensors[".".join(EMBEDDING) if is_table else entry.name]


def _of_layer(stacked: T, layer: int | None) -> T:
    layer_of: T = stacked if layer is None else jax.tree.map(lambda leaf: leaf[layer], stacked)
    return layer_of
