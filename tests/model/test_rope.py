"""Rotary positions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from phi3_jax.model import rope
from phi3_jax.model.rope import apply_rope, length_in_use, rotate_by_product


def test_length_in_use_is_each_documents_own() -> None:
    segments = jnp.asarray([[1, 1, 1, 2, 2, 0]])
    positions = jnp.asarray([[0, 1, 2, 0, 1, 9]])
    assert length_in_use(positions, segments)[0, :5].tolist() == [3, 3, 3, 2, 2]


@pytest.mark.parametrize(
    ("pairs", "heads", "dtype"),
    [(48, 4, jnp.bfloat16), (36, 4, jnp.bfloat16), (48, 1, jnp.float16)],
    ids=["whole", "partial", "one kv head, float16"],
)
def test_a_rotation_by_a_product_is_the_same_bit_for_bit(pairs, heads, dtype, monkeypatch):
    rng = np.random.default_rng(pairs)
    x, g = (jnp.asarray(rng.normal(size=(2, 16, heads, 96)), dtype) for _ in "xg")
    angles = rng.uniform(0, 2000, (2, 16, pairs))
    cos, sin = (jnp.asarray(f(angles) * 1.19, dtype) for f in (np.cos, np.sin))  # with LongRoPE's factor

    def both_ways(rotate):
        out, backward = jax.vjp(jax.jit(lambda x: rotate(x, cos, sin)), x)
        return np.asarray(out), np.asarray(backward(g)[0])

    expected = both_ways(apply_rope)
    np.testing.assert_array_equal(both_ways(rotate_by_product), expected)
    monkeypatch.setattr(rope, "rotate_by_product", lambda x, cos, sin: x)
    monkeypatch.setattr(rope, "platform", lambda: "tpu")
    assert apply_rope(x, cos, sin) is x
    wide = x.astype(jnp.float32)  # whose last bit would differ
    assert apply_rope(wide, cos, sin) is not wide
