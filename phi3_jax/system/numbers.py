"""Numbers from files and from users: which values are any."""

from typing import TypeGuard


def is_whole(value: object) -> TypeGuard[int]:
    """Whether it is a whole number; true and false, which Python counts among them, are none."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: object) -> TypeGuard[float]:
    """Whether it is a whole number or a float, infinity and NaN among them; true and false are none."""
    return isinstance(value, int | float) and not isinstance(value, bool)
