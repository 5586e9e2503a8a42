"""The decoder layers, stacked in one array each, and the one way to run them one after another."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, PRNGKeyArray

from phi3_jax.model.dropout import DropKey, DropoutKey
from phi3_jax.model.layers import Attend, Kept, Phi3DecoderLayer
from phi3_jax.model.protocols import Adapters, State
from phi3_jax.model.remat import Policy
from phi3_jax.model.rope import CosSin
from phi3_jax.parallel.mesh import platform

Carry = TypeVar("Carry")
Out = TypeVar("Out")


@jax.custom_vjp
def layer_weight(
    stack: Float[Array, "layers *shape"], own: Float[Array, "*shape"], index: Int[Array, ""]
) -> Float[Array, "*shape"]:
    """`stack[index]`, whose gradient belongs to `own`, the same slice as the scan hands it out.

    XLA's CPU backend slices bfloat16 in float32, then moves the conversion of the whole stack out of
    the loop: three times the weights' memory. Behind a barrier that depends on the index there is
    nothing to move. Slicing the closed-over stack alone would do that, too, but the gradient of
    each slice would then be added to one of the whole stack.
    """
    del own
    if platform() == "cpu":
        stack, index = jax.lax.optimization_barrier((stack, index))
    return jax.lax.squeeze(jax.lax.dynamic_slice_in_dim(stack, index, 1), (0,))


layer_weight.defvjp(
    lambda stack, own, index: (layer_weight(stack, own, index), None), lambda _, gradient: (None, gradient, None)
)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Layer:
    """One decoder layer and all that is its own. A pytree, to be called.

    Attributes:
        graph: what a layer is made of.
        weights: its weights.
        adapters: its adapters, by module.
        key: for its dropout; None for none.
        index: in a scan, its place in the stack.
        stack: in a scan, the weights of all layers, of which its own are taken.
    """

    graph: nnx.GraphDef[Phi3DecoderLayer] = field(metadata={"static": True})
    weights: State
    adapters: Adapters
    key: DropKey | None = None
    index: Int[Array, ""] | None = None
    stack: State | None = None

    def __call__(
        self, x: Float[Array, "batch seq hidden"], cos_sin: CosSin, attend: Attend[Kept], pieces: int = 1
    ) -> tuple[Float[Array, "batch seq hidden"], Kept]:
        """The layer's output for `x`, and what `attend` hands on."""
        weights = self.weights
        if self.stack is not None:
            weights = jax.tree.map(lambda stack, own: layer_weight(stack, own, self.index), self.stack, weights)
        return nnx.merge(self.graph, weights)(x, cos_sin, attend, self.adapters, self.key, pieces)


@dataclass(frozen=True)
class LayerStack:
    """All decoder layers with what belongs to each: scanned over, or taken one by one.

    Attributes:
        graph: what a single layer is made of.
        arrays: weights, adapters and dropout keys, each with the layers as its first axis.
        number: how many layers there are.
        places: where in the global batch the positions are, if this is part of one; see `DropoutKey`.
    """

    graph: nnx.GraphDef[Phi3DecoderLayer]
    arrays: tuple[State, Adapters, PRNGKeyArray | None]
    number: int
    places: Array | None = None

    @classmethod
    def of(cls, layers: Phi3DecoderLayer, number: int, adapters: Adapters, key: DropKey | None = None) -> "LayerStack":
        """The stack of a module made with `stack=(number,)`; `key` is split into one for each layer."""
        graph, weights = nnx.split(layers)
        whole, places = (key.key, key.places) if isinstance(key, DropoutKey) else (key, None)
        keys = None if whole is None else jax.random.split(whole, number)
        return cls(graph, (weights, adapters, keys), number, places)

    def __getitem__(self, index: int) -> Layer:
        """A layer by its place, its arrays sliced out of the stack."""
        if not 0 <= index < self.number:
            raise IndexError(f"there are {self.number} layers, counted from 0, and {index} was asked for")
        weights, adapters, key = jax.tree.map(lambda stack: stack[index], self.arrays)
        return Layer(self.graph, weights, adapters, self._placed(key))

    def _placed(self, key: PRNGKeyArray | None) -> DropKey | None:
        return key if key is None or self.places is None else DropoutKey(key, self.places)

    def __iter__(self) -> Iterator[Layer]:
        return (self[index] for index in range(self.number))

    def scan(
        self, step: Callable[[Carry, Layer], tuple[Carry, Out]], carry: Carry, policy: Policy | None = None
    ) -> tuple[Carry, Out]:
        """`step` layer after layer in one compiled loop, so that compile time does not grow with depth.

        Args:
            step: takes what the layer before handed on, and the layer; gives what it hands on, and its own result.
            carry: what the first layer is given.
            policy: what a layer keeps for the backward pass, see `remat_policy`; None leaves that to JAX.

        Returns:
            What the last layer handed on, and all results, stacked.
        """
        weights, adapters, keys = self.arrays

        def body(carry: Carry, own: tuple[Array, State, Adapters, PRNGKeyArray | None]) -> tuple[Carry, Out]:
            index, own_weights, adapters, key = own
            return step(carry, Layer(self.graph, own_weights, adapters, self._placed(key), index, stack=weights))

        if policy is not None:
            # Inside a scan XLA cannot undo rematerialisation, so no barrier against that is needed.
            body = jax.checkpoint(body, prevent_cse=False, policy=policy)
        return jax.lax.scan(body, carry, (jnp.arange(self.number), weights, adapters, keys))
