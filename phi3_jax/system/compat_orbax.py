"""What leans on the insides of Orbax and TensorStore, each with the reason and a test."""

import os
import re
from collections.abc import Mapping
from pathlib import Path

import jax
from orbax.checkpoint import v1 as ocp


def context_with_json(name: str) -> ocp.Context:
    """A context in which the checkpointable `name` is written as JSON.

    Left to choose, Orbax would take a dict of numbers for a tree of arrays. `v1` has no stable interface yet.
    """
    context = ocp.Context()
    context.checkpointables.registry = ocp.handlers.local_registry()
    context.checkpointables.registry.add(ocp.handlers.JsonHandler, checkpointable_name=name)
    return context


def disk_error(error: BaseException) -> OSError | None:
    """The `OSError` that an error of Orbax's is or tells of, None where it is about something else.

    Where TensorStore wrote, a `ValueError` is raised, and the number of the error stands in its text alone.
    """
    number = re.search(r"os_error_code='(\d+)'", str(error)) if isinstance(error, OSError | ValueError) else None
    if number:
        return OSError(int(number[1]), os.strerror(int(number[1])))
    return error if isinstance(error, OSError) else None


def load_arrays(folder: Path, name: str, wanted: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
    """Some of the arrays of a checkpointable, by name, on the first device; the others are not read.

    Args:
        folder: The checkpoint.
        name: Of the checkpointable, a dictionary of arrays.
        wanted: What is to be read.

    Raises:
        ValueError: Where shapes are others, or a name is not there.
    """
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    abstract = {key: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device) for key, leaf in wanted.items()}
    context = ocp.Context()
    context.pytree.loading.partial_load = True
    with context:
        try:
            found: dict[str, jax.Array] = ocp.load_checkpointables(folder.absolute(), {name: abstract})[name]
        except KeyError as error:  # another shape is called a lack of handlers
            raise ValueError(f"{name} has arrays of other shapes") from error
    missing = [key for key, value in found.items() if not isinstance(value, jax.Array)]  # what was wanted comes back
    if missing:
        raise ValueError(f"{name} has no {missing[0]}")
    return found
