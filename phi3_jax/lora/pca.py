"""Principal components of rows that come in batches."""

from dataclasses import dataclass, replace
from typing import Self

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from phi3_jax.lora.singular import randomised_svd
from phi3_jax.model.products import precise

POWER_ITERATIONS = 4  # of the randomised SVD, and twice as many columns as components, as in PEFT


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class IncrementalPCA:
    """Principal components of rows that come in batches, after Ross et al. (https://doi.org/10.1007/s11263-007-0075-7)
    as scikit-learn and PEFT have it: each batch is joined by what is left of those before it.

    Attributes:
        components: the k first, in order.
        singular_values: of each component.
        mean: of all rows so far.
        count: how many those are.
        variation: the sum of their squares about the mean.
        converged: whether the last batch left a component as it was.
    """

    components: Float[Array, "k in"]
    singular_values: Float[Array, "k"]
    mean: Float[Array, "in"]
    count: Float[Array, ""]
    variation: Float[Array, ""]
    converged: Bool[Array, "k"]

    @classmethod
    def empty(cls, components: int, inputs: int) -> Self:
        """Before any row."""
        zero = jnp.zeros((), jnp.float32)
        wide = jnp.zeros((components, inputs), jnp.float32)
        return cls(wide, wide[:, 0], wide[0], zero, zero, jnp.zeros(components, bool))

    def updated(self, x: Float[Array, "rows in"], counted: Bool[Array, "rows"], tau: float, key: PRNGKeyArray) -> Self:
        """With the rows of `x` that count; converged is what has a cosine of at least `tau` with what it was."""
        x = x.astype(jnp.float32)
        number = jnp.sum(counted, dtype=jnp.float32)
        total = self.count + number
        mean = jnp.sum(x, axis=0, where=counted[:, None]) / number
        centred = jnp.where(counted[:, None], x - mean, 0)
        shift = jnp.sqrt(self.count / total * number) * (self.mean - mean)
        with precise(jnp.float32):
            before = self.singular_values[:, None] * self.components
            k = self.components.shape[0]
            rows = jnp.concatenate([before, centred, shift[None]])
            _, s, v = randomised_svd(rows, 2 * k, POWER_ITERATIONS, key)
        v = v[:k] * jnp.sign(jnp.take_along_axis(v[:k], jnp.argmax(jnp.abs(v[:k]), axis=1)[:, None], axis=1))
        return replace(
            self,
            components=v,
            singular_values=s[:k],
            mean=(self.count * self.mean + number * mean) / total,
            count=total,
            variation=self.variation + jnp.sum(centred**2) + jnp.sum(shift**2),
            converged=(self.count > 0) & (jnp.sum(v * self.components, axis=1) >= tau),
        )

    @property
    def explained(self) -> Float[Array, "k"]:
        """Each component's share of the whole variance."""
        return self.singular_values**2 / self.variation

    def initial_A(self, rank: int, whiten: bool) -> Float[Array, "r in"]:
        """A of that rank: the first components, with `whiten` divided by the root of their singular values."""
        if not whiten:
            return self.components[:rank]
        return self.components[:rank] / jnp.sqrt(self.singular_values[:rank, None])
