"""Sizes rounded up to few: a compiled program is specific to its shapes."""

import math


def power(number: int, base: int = 2) -> int:
    """The least power of `base` that is no less than `number`.

    Example:
        >>> power(5), power(8), power(5, base=4)
        (8, 8, 16)
    """
    result = 1
    while result < number:
        result *= base
    return result


def bucket(length: int, *, least: int = 16, doubling: int = 64) -> int:
    """The length that programs are compiled for: a power of two, then in steps that waste less and less.

    Args:
        length: How much it has to hold.
        least: The smallest bucket.
        doubling: Up to where the next bucket is twice the one before.

    Example:
        >>> [bucket(length) for length in (3, 17, 65, 513, 5000)]
        [16, 32, 128, 768, 5120]
        >>> bucket(513, least=64, doubling=2048)
        1024
    """
    if length <= doubling:
        return max(least, power(length))
    step = 64 if length <= 512 else 256 if length <= 4096 else 1024
    return math.ceil(length / step) * step
