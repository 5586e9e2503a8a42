"""A mesh always: of one device where there is one, and then free of charge."""

import jax
import jax.numpy as jnp
import pytest

from phi3_jax.parallel.devices import Devices
from phi3_jax.parallel.mesh import ALONE, AXES, ambient_mesh, describe_mesh, make_mesh, pass_rows
from phi3_jax.parallel.sharding import constrain


def test_without_a_mesh_there_is_one_of_one_device():
    assert ambient_mesh() is ALONE
    assert dict(ambient_mesh().shape) == dict.fromkeys(AXES, 1)
    with jax.set_mesh(make_mesh({})):
        assert ambient_mesh() is ALONE
    with jax.set_mesh(jax.make_mesh((1,), ("mine",))):
        assert ambient_mesh() is ALONE


@pytest.mark.parametrize("parallel", [None, {}])
def test_constraints_are_left_out_on_one_device(parallel):
    x = jnp.ones((2, 3))
    if parallel is None:
        assert constrain(x, "batch", "seq") is x
        return
    with jax.set_mesh(make_mesh(parallel)):
        assert constrain(x, "batch", "seq") is x


def test_rows_and_parameters_get_onto_the_one_device():
    devices = Devices(make_mesh({}))
    assert devices.batch_size(3) == 3
    assert devices.rows_here(3) is None
    batch = devices.put({"input_ids": jnp.arange(6).reshape(2, 3).__array__()}, 2)
    assert batch["input_ids"].tolist() == [[0, 1, 2], [3, 4, 5]]
    key = devices.replicate(jax.random.key(0))
    assert jax.random.uniform(key) == jax.random.uniform(jax.random.key(0))
    assert describe_mesh(devices.mesh) == "on 1 cpu device"


def test_rows_of_a_pass():
    assert pass_rows(3, {"data": 2, "fsdp": 4, "tensor": 5, "context": 7}) == 24
