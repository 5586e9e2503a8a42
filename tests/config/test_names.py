"""The known name that a misspelt one was meant to be."""

import pytest

from phi3_jax.config.names import nearest


@pytest.mark.parametrize(
    ("name", "expected"),
    [("lr", "learning_rate"), ("learning_rat", "learning_rate"), ("batch_size", "per_device_batch_size")],
)
def test_by_letters_by_initials_and_by_a_part(name, expected):
    assert nearest(name, ["seed", "literal_roles", "learning_rate", "per_device_batch_size"]) == expected
