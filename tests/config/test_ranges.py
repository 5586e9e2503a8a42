"""Numbers out of range, those that are none among them."""

from types import SimpleNamespace

import pytest

from phi3_jax import InputError
from phi3_jax.config.ranges import check_range


def test_what_is_not_set_is_left_alone():
    check_range("data", SimpleNamespace(max_rows=None), "max_rows", low=1)


def test_whole_numbers_are_those_that_devices_count_with():
    check_range("data", SimpleNamespace(rows=2**31 - 1, seed=2**31), "rows seed", low=0)
    with pytest.raises(InputError, match=r"^data.rows is 10,000,000,000, expected at most 2,147,483,647$"):
        check_range("data", SimpleNamespace(rows=10**10), "rows", low=0)


@pytest.mark.parametrize(
    ("value", "limits", "wanted"),
    [
        (0, {"low": 1}, "at least 1"),
        (1.5, {"low": 0, "high": 1}, "from 0 to 1"),
        (1.0, {"low": 0, "below": 1}, "at least 0 and below 1"),
        (float("nan"), {"low": 0}, "at least 0"),
        (float("inf"), {"low": 0}, "at least 0"),
    ],
)
def test_what_is_out_of_range_is_named_with_the_range(value, limits, wanted):
    with pytest.raises(InputError, match=rf"^data.share is {value}, expected {wanted}$"):
        check_range("data", SimpleNamespace(share=value), "share", **limits)
