"""What the host does between two calls of the device."""

import numpy as np
import pytest

from phi3_jax import InputError
from phi3_jax.generation.answers import check_finite


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_logits_that_are_not_finite_are_told(value):
    check_finite(np.zeros(3))
    with pytest.raises(InputError, match="logits are not finite"):
        check_finite(np.array([0.0, value]))
