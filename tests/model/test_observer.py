"""An adapter that looks on."""

import jax.numpy as jnp
import numpy as np

from phi3_jax.model.observer import Observer


class Doubling:
    def __call__(self, y, x, weight, key):
        return 2 * y

    def part(self, rows):
        return self


def test_it_tells_and_changes_nothing():
    seen = []
    x, weight = jnp.ones((1, 3)), jnp.ones((2, 3))
    y = x @ weight.T
    np.testing.assert_array_equal(Observer(lambda *what: seen.append(what))(y, x, weight), y)
    adapted = Observer(lambda *what: seen.append(what), Doubling())
    np.testing.assert_array_equal(adapted.part(slice(0, 1))(y, x, weight), 2 * y)
    assert [np.asarray(out).tolist() for *_, out in seen] == [[[3, 3]], [[6, 6]]]
