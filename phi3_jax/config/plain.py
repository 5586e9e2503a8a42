"""Values of Python's, NumPy's and PyTorch's own kinds as YAML would hold them."""

import os
from collections.abc import Mapping
from enum import Enum


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
