"""TPU's splash attention."""

import jax.numpy as jnp
import numpy as np
import pytest

from phi3_jax.model.flash import visible
from tests.helpers.attention import assert_close, inputs, packed, program, reference


def test_splash_equals_the_definition():
    """Interpreted, at a length that is filled up to two of its blocks."""
    arrays, ids = inputs(200, 4, 2, head_dim=128, batch=1), packed(200)[:1]
    assert_close(program("splash", 150, interpret=True)(*arrays, ids), reference(*arrays, ids, 150), 5e-6)


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
