"""What the models of an evaluation are called."""

import pytest

from phi3_jax import InputError
from phi3_jax.evaluate.names import name_models


def test_names_are_given_or_those_of_folders():
    assert name_models(["orders=out/a", "out/demo/adapter", "x/y"]) == {
        "orders": "out/a",
        "demo": "out/demo/adapter",
        "y": "x/y",
    }
    with pytest.raises(InputError, match="both named y"):
        name_models(["x/y", "z/y"])
