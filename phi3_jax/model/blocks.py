"""Blocks: the pieces that attention and the loss cut long axes into."""

import math

# Splash attention, the kernel for TPUs, cuts rows into blocks of a multiple of this.
SPLASH_BLOCK = 128
# What it reads at a time, and of that multiplies at a time. By the instructions that libtpu schedules for a block,
# 1,024 takes as long as 512 for a causal row of 2,048, and for long ones 17% (v5e) and 20% (v6e) less.
LARGEST_SPLASH_BLOCK, LARGEST_SPLASH_PRODUCT = 1024, 512
# Up to so many blocks of keys its backward pass is one kernel, which makes a whole gradient of the queries for each: by
# the same count a quarter (v5e) to a third (v6e) less than two kernels.
FUSED_SPLASH_BLOCKS = 4


def even_block(length: int, largest: int) -> int:
    """The size of blocks that cut a length evenly, the last one filled up.

    As few blocks as `largest` allows; where there are several, of a multiple of 8.

    Example:
        >>> even_block(100, 256), even_block(300, 256)
        (100, 152)
    """
    blocks = math.ceil(length / largest)
    return length if blocks == 1 else math.ceil(length / blocks / 8) * 8


def splash_block(length: int, largest: int | None = None) -> int:
    """The largest size for splash attention that leaves nothing to fill up; `length`, a multiple of `SPLASH_BLOCK`.

    Example:
        >>> splash_block(768), splash_block(2048), splash_block(2048, 512)
        (768, 1024, 512)
    """
    sizes = range(SPLASH_BLOCK, (largest or LARGEST_SPLASH_BLOCK) + 1, SPLASH_BLOCK)
    return max(size for size in sizes if length % size == 0)
