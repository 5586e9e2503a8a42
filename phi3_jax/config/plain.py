"""Values of Python's, NumPy's and PyTorch's own kinds, and the text of a command line, as YAML would hold them."""

import os
import re
from collections.abc import Mapping
from enum import Enum

from phi3_jax.system.reading import parse_yaml


def plain(value: object) -> object:
    """An enum, a path, a NumPy number or array, a torch dtype or a set as text, numbers and lists.

    A set has no order of its own to keep, and gets one. Mappings and lists are looked into.

    Example:
        >>> import numpy as np
        >>> from phi3_jax.config.plain import plain
        >>> plain({"b", "a"}), plain({"num_cycles": np.float64(0.5)}), plain(np.bool_(True))
        (['a', 'b'], {'num_cycles': 0.5}, True)
    """
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, set | frozenset):
        return sorted(value, key=str)
    if isinstance(value, Mapping):
        return {key: plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        entries = [plain(entry) for entry in value]
        return tuple(entries) if isinstance(value, tuple) else entries
    if type(value).__module__ in ("numpy", "torch"):
        of_array = getattr(value, "tolist", None)
        return of_array() if of_array is not None else str(value).removeprefix("torch.")
    return value


def typed(value: object) -> object:
    """What the text of a command line or of a file means; any other value is itself.

    Example:
        >>> from phi3_jax.config.plain import typed
        >>> typed("true"), typed("1e-4"), typed("[1, 2]"), typed("a: b: c")
        (True, 0.0001, [1, 2], 'a: b: c')
    """
    if not isinstance(value, str):
        return value
    if re.fullmatch(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+", value):  # text for YAML, which wants 1.0e-4
        return float(value)
    try:
        parsed: object = parse_yaml(value)
    except ValueError:
        return value  # text it is, which no key takes that asks
    return parsed
