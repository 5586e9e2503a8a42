"""The one table of what lies where."""

import pytest
from jax.sharding import AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P

from phi3_jax import InputError
from phi3_jax.parallel.mesh import AXES
from phi3_jax.parallel.sharding import check_tensor_axis, spec

MESH = AbstractMesh((2, 2, 2, 1), AXES, (AxisType.Auto,) * 4)


def test_sizes_that_do_not_divide_leave_the_last_axes_out():
    assert spec((8, 5), ("kept_heads", None), MESH) == P(("tensor", "fsdp"), None)
    assert spec((6, 5), ("kept_heads", None), MESH) == P(("tensor",), None)
    assert spec((5, 5), ("kept_heads", "kept"), MESH) == P(None, None)
    assert spec((4, 6), ("batch", "seq"), MESH) == P(("data", "fsdp"), None)


def test_a_tensor_axis_that_does_not_divide_is_refused():
    check_tensor_axis(2, {"heads": 4})
    with pytest.raises(InputError, match="does not divide 4 heads"):
        check_tensor_axis(3, {"heads": 4})
