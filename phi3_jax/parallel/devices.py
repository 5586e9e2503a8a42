"""The devices that share a piece of work, one or a mesh of them, and how its rows and parameters get onto them."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array

from phi3_jax.parallel.distributed import local_rows
from phi3_jax.parallel.distributed import place as place_batch
from phi3_jax.parallel.layout import batch_sharding, place, shardings
from phi3_jax.parallel.sharding import replicated


@dataclass(frozen=True)
class Devices:
    """**Fields**: `mesh`, None for a single device."""

    mesh: Mesh | None

    @property
    def number(self) -> int:
        return 1 if self.mesh is None else self.mesh.size

    def in_use(self) -> AbstractContextManager[Any]:
        """Within it, what is compiled is compiled for the mesh."""
        return nullcontext() if self.mesh is None else jax.set_mesh(self.mesh)

    def batch_size(self, per_device: int) -> int:
        """Rows of a forward pass over all devices; those of `tensor` and `context` share theirs."""
        return per_device if self.mesh is None else per_device * self.mesh.shape["data"] * self.mesh.shape["fsdp"]

    def rows_here(self, batch_size: int) -> Sequence[int] | None:
        """Which rows of such a batch this host's devices need; None for all."""
        if self.mesh is None or jax.process_count() == 1:
            return None
        return local_rows(batch_sharding(self.mesh, 2), (batch_size, self.mesh.shape["context"]))

    def put(self, batch: dict[str, np.ndarray], batch_size: int) -> dict[str, Array]:
        """A batch of this host's rows `[..., batch, seq]` on the devices, as part of the whole."""
        if self.mesh is None:
            return jax.device_put(batch)
        return place_batch(batch, batch_sharding(self.mesh, batch["input_ids"].ndim), batch_size)

    def spread(self, params: Any) -> Any:
        """Parameters `{"model": …, "lora": …}`, each array where `layout.shardings` has it."""
        return params if self.mesh is None else place(params, shardings(params, self.mesh))

    def replicate(self, tree: Any) -> Any:
        """Small arrays, whole on every device."""
        if self.mesh is None:
            return tree
        whole = replicated(self.mesh)
        return place(tree, jax.tree.map(lambda _: whole, tree))
