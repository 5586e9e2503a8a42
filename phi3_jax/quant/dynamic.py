"""The 8-bit dynamic data type, in which bitsandbytes keeps NF4's statistics and its optimizers' moments."""

from functools import cache

import numpy as np
from jaxtyping import Float


@cache
def dynamic_map(*, signed: bool) -> Float[np.ndarray, "256"]:
    """The numbers that the 256 codes stand for, ascending: bitsandbytes' `create_dynamic_map`.

    From Dettmers, 8-Bit Approximations for Parallelism in Deep Learning, https://arxiv.org/abs/1511.04561.

    Seven decades, from 1e-7 up to 1, each cut into twice as many equal parts as the one below, of
    which the middles are taken; then 0 and 1.
    """
    low = np.float32(0.1)
    decades = []
    for exponent in range(7):
        parts = 2 ** (exponent if signed else exponent + 1)
        width = np.float64((1 - low) / np.float32(parts))
        # PyTorch's linspace: from either end to the middle, with one rounding at each number.
        i = np.arange(parts + 1)
        ends = np.where(i < (parts + 1) // 2, low + width * i, 1 - width * (parts - i)).astype(np.float32)
        middles = (ends[:-1] + ends[1:]) / np.float32(2)
        decades.append(np.float32(10.0 ** (exponent - 6)) * middles)
    positive = np.concatenate(decades)
    return np.sort(np.concatenate([positive, -positive if signed else [], [0, 1]]).astype(np.float32))
