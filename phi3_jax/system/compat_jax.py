"""What leans on the insides of JAX, each with the reason; a test of each fails when the inside changes."""

from collections.abc import Callable
from typing import Protocol

from jax._src import cloud_tpu_init, distributed
from jaxtyping import Array, PyTree


class KeyValueStore(Protocol):
    """What processes tell one another through their coordinator."""

    def key_value_set(self, key: str, value: str) -> None: ...

    def blocking_key_value_get(self, key: str, timeout_in_ms: int) -> str: ...


class DistributedState(Protocol):
    """This process among several.

    Attributes:
        process_id: which it is, from 0.
        num_processes: how many there are.
        client: the coordinator's store, None where the process is alone.
        preemption_sync_manager: what hands SIGTERM on to the others, None where that is off.
    """

    process_id: int
    num_processes: int
    client: KeyValueStore | None
    preemption_sync_manager: object | None


def distributed_state() -> DistributedState:
    """What `jax.distributed.initialize` has set up.

    `jax.process_index` and `jax.process_count` start the devices, which some of what is asked here has to come
    before; and the coordinator's store, which needs no device, has no public name.
    """
    state: DistributedState = distributed.global_state
    return state


def on_cloud_tpu() -> bool:
    """Whether JAX takes this host for a Cloud TPU VM; to ask in public is to start the devices."""
    return bool(cloud_tpu_init.running_in_cloud_tpu_vm)


def add_gradients(backward: Callable[[Array], PyTree[Array]], sums: PyTree[object], cotangent: Array) -> None:
    """Has what `jax.vjp` gave add its gradients to references, in place and as soon as it has each of them.

    The only way of JAX to accumulate in the middle of a backward pass; not in its documentation or annotations.

    Args:
        backward: the second result of `jax.vjp`, of a function of one argument.
        sums: a reference (`jax.new_ref`) for each array of that argument.
        cotangent: that of the function's result.
    """
    backward.with_refs(sums)(cotangent)  # type: ignore[attr-defined]  # missing in JAX's annotations
