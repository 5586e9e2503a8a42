"""Steps whose loss or gradient is not finite: recognised and left out on the device, without asking the host."""

from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

T = TypeVar("T")

KEPT = 8  # skipped steps that are known by their number; of more between two lines, the last ones


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Skips:
    """The steps that were skipped, counted on the device.

    Attributes:
        in_a_row: since the last step that was taken.
        total: in all.
        newest: the numbers of the last ones, counted from 0; that of the n-th skipped step is at place n % `KEPT`.
    """

    in_a_row: Int[Array, ""]
    total: Int[Array, ""]
    newest: Int[Array, "kept"]

    @classmethod
    def none(cls) -> "Skips":
        return cls(jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32), jnp.zeros(KEPT, jnp.int32))

    def judge(self, step: Int[Array, ""], is_finite: Bool[Array, ""], limit: int) -> tuple[Bool[Array, ""], "Skips"]:
        """Whether to take the step, and the counts after it.

        After more than `limit` skipped steps in a row no further one is taken, nor counted: what the
        host finds does not depend on when it looks.
        """
        is_over = self.in_a_row > limit
        skipped = ~is_finite & ~is_over
        in_a_row = jnp.where(is_over, self.in_a_row, jnp.where(is_finite, 0, self.in_a_row + 1))
        newest = self.newest.at[self.total % KEPT].set(jnp.where(skipped, step, self.newest[self.total % KEPT]))
        return is_finite & ~is_over, Skips(in_a_row, self.total + skipped, newest)

    def since(self, told: int) -> list[int]:
        """On the host: the numbers of the steps skipped after the first `told`, ascending; at most `KEPT`."""
        total = int(self.total)
        newest = np.asarray(self.newest)
        return [int(newest[n % KEPT]) for n in range(max(told, total - KEPT), total)]

    def taken(self, step: int) -> int:
        """On the host: how many of the first `step` steps were taken, whatever came after too many skips."""
        last = int(self.newest[(int(self.total) - 1) % KEPT])
        return (last + 1 if self.in_a_row else step) - int(self.total)

    def last_taken(self, step: int) -> int:
        """On the host: the number, from 0, of the last step that was taken; negative where none was."""
        last = int(self.newest[(int(self.total) - 1) % KEPT])
        return last - int(self.in_a_row) if self.in_a_row else step - 1


def choose(takes: Bool[Array, ""], new: T, old: T) -> T:
    """The leaves of `new` where the step is taken, else those of `old`, bit for bit."""
    chosen: T = jax.tree.map(partial(jnp.where, takes), new, old)
    return chosen
