"""What leans on the insides of Orbax and TensorStore, each with the reason and a test."""

import os
import re

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
