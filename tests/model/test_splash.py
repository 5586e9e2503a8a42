"""TPU's splash attention."""

import jax.numpy as jnp
import numpy as np
import pytest

from phi3_jax.model import blocks
from phi3_jax.model.flash import visible
from phi3_jax.model.splash import block_sizes
from tests.helpers.attention import assert_close, inputs, packed, program, reference


@pytest.mark.parametrize(
    ("block", "product", "fused"),
    [(256, 128, 4), (128, 128, 4), (128, 128, 1)],
    ids=["products of parts", "fused backward", "two kernels backward"],
)
def test_splash_equals_the_definition(block, product, fused, monkeypatch):
    """Interpreted, at a length that is filled up to two of the smallest blocks."""
    sizes = {"SPLASH_BLOCK": block, "SPLASH_PRODUCT": product}
    for name, size in sizes.items():
        monkeypatch.setattr(blocks, f"LARGEST_{name}", size)
    monkeypatch.setattr(blocks, "FUSED_SPLASH_BLOCKS", fused)
    arrays, ids = inputs(200, 4, 2, head_dim=128, batch=1), packed(200)[:1]
    assert_close(program("splash", 150, interpret=True)(*arrays, ids), reference(*arrays, ids, 150), 5e-6)


def test_blocks_are_as_large_as_memory_allows_and_the_backward_pass_one_kernel_for_short_rows():
    assert block_sizes(4096, 1).use_fused_bwd_kernel
    assert not block_sizes(8192, 1).use_fused_bwd_kernel
    sizes = block_sizes(2048, 1)
    assert (sizes.block_q, sizes.block_kv, sizes.block_kv_compute) == (1024, 1024, 512)
    assert sizes.use_fused_bwd_kernel
    assert sizes.block_q_dq is None
    long = block_sizes(131072, 16)
    assert (long.block_q_dkv, long.block_kv_dkv, long.block_q_dq) == (1024, 1024, 1024)
    assert not long.use_fused_bwd_kernel


@pytest.mark.parametrize("window", [None, 258, 383])
def test_splash_mask_is_the_mask_that_its_blocks_say(window):
    """Blocks of a single value, which the kernel visits or not without looking further, are told right."""
    from phi3_jax.model.splash import _WindowMask

    length, size = 768, 128
    mask = _WindowMask((length, length), (None if window is None else window - 1, 0), 0)
    ids = jnp.ones((1, length), int)
    expected = np.asarray(visible(ids, ids, 0, 0, window)[0])
    kinds = set()
    for i in range(0, length, size):
        for j in range(0, length, size):
            index = slice(i, i + size), slice(j, j + size)
            kinds.add(mask[index].shape)
            np.testing.assert_array_equal(np.broadcast_to(mask[index], (size, size)), expected[index])
    assert kinds == {(1, 1), (size, size)}
