"""The devices that share a piece of work, and how its rows and parameters get onto them."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TypeVar

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Int

from phi3_jax.parallel.distributed import local_rows
from phi3_jax.parallel.distributed import place as place_batch
from phi3_jax.parallel.layout import batch_sharding, place, shardings
from phi3_jax.parallel.mesh import pass_rows
from phi3_jax.parallel.sharding import replicated

T = TypeVar("T")


@dataclass(frozen=True)
class Devices:
    """A mesh at work.

    Attributes:
        mesh: the devices, with the axes of `parallel.mesh.AXES`; of size 1 where there is one.
    """

    mesh: Mesh

    def in_use(self) -> AbstractContextManager[object]:
        """Within it, what is compiled is compiled for the mesh."""
        return jax.set_mesh(self.mesh)

    def batch_size(self, per_device: int) -> int:
        """Rows of a forward pass over all devices; those of `tensor` and `context` share theirs."""
        return pass_rows(per_device, self.mesh.shape)

    def rows_here(self, batch_size: int) -> Sequence[int] | None:
        """Which rows of such a batch this host's devices need; None for all."""
        if jax.process_count() == 1:
            return None
        return local_rows(batch_sharding(self.mesh, 2), (batch_size, self.mesh.shape["context"]))

    def put(
        self, batch: dict[str, Int[np.ndarray, "*steps rows seq"]], batch_size: int
    ) -> dict[str, Int[Array, "*steps batch seq"]]:
        """A batch of this host's rows on the devices, as part of the whole of `batch_size` rows."""
        return place_batch(batch, batch_sharding(self.mesh, batch["input_ids"].ndim), batch_size)

    def spread(self, params: T) -> T:
        """Parameters `{"model": …, "lora": …}`, each array where `layout.shardings` has it."""
        return place(params, shardings(params, self.mesh))

    def replicate(self, tree: T) -> T:
        """Small arrays, whole on every device."""
        whole = replicated(self.mesh)
        return place(tree, jax.tree.map(lambda _: whole, tree))
