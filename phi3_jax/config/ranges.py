"""Whether the numbers of a section are in range."""

from phi3_jax.system.errors import InputError

# The largest whole number that devices count with.
MOST = 2**31 - 1


def check_range(
    section: str, values: object, names: str, *, low: float, high: float | None = None, below: float | None = None
) -> None:
    """Looks whether the numbers of a section are in a range; those that are None are left alone.

    Whole numbers, but seeds, are below 2³¹, which is what devices count with.

    Args:
        section: The section's name.
        values: The section.
        names: Those of the numbers, with spaces between.
        low: The least one.
        high: The largest one.
        below: What is larger than all.

    Raises:
        InputError: For the first that is not, or that is no finite number.

    Example:
        >>> from types import SimpleNamespace
        >>> check_range("data", SimpleNamespace(max_rows=3, eval_fraction=0.5), "max_rows eval_fraction", low=0)
        >>> check_range("data", SimpleNamespace(max_rows=-3), "max_rows", low=0)
        Traceback (most recent call last):
            ...
        phi3_jax.system.errors.InputError: data.max_rows is -3, expected at least 0
    """
    for name in names.split():
        value = getattr(values, name)
        if value is None:
            continue
        wanted = f"at least {low}"
        if high is not None:
            wanted = f"from {low} to {high}"
        elif below is not None:
            wanted = f"at least {low} and below {below}"
        # Written so that NaN, which compares false with everything, is refused too, and infinity.
        if not (low <= value < float("inf") and (high is None or value <= high) and (below is None or value < below)):
            raise InputError(f"{section}.{name} is {value}, expected {wanted}")
        if isinstance(value, int) and value > MOST and not name.endswith("seed"):
            raise InputError(f"{section}.{name} is {value:,}, expected at most {MOST:,}")
