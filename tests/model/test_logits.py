import jax.numpy as jnp
import numpy as np

from phi3_jax.model.logits import likeliest


def test_the_likeliest_token_is_the_first_of_equals_as_in_argmax():
    logits = np.random.default_rng(0).integers(0, 4, (5, 3, 30)).astype(np.float32)
    np.testing.assert_array_equal(likeliest(jnp.asarray(logits)), logits.argmax(-1))
    known = jnp.max(logits, axis=-1, keepdims=True)
    np.testing.assert_array_equal(likeliest(jnp.asarray(logits), known), logits.argmax(-1))


def test_where_nothing_is_a_number_no_token_is_likeliest():
    assert likeliest(jnp.full((1, 7), jnp.nan)).tolist() == [7]
