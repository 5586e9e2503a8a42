"""Runs from dictionaries, and what is wrong with them."""

import pytest

from phi3_jax import InputError
from phi3_jax.config.run import parse_run_config


def parse(**sections):
    return parse_run_config({"model": {"name_or_path": "base"}, **sections})


def error(**sections) -> str:
    with pytest.raises(InputError) as caught:
        parse(**sections)
    assert "\n" not in str(caught.value)
    return str(caught.value)
