"""A mesh always: of one device where there is one, and then free of charge."""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import pytest

from phi3_jax.parallel import mesh
from phi3_jax.parallel.devices import Devices
from phi3_jax.parallel.mesh import (
    ALONE,
    AXES,
    ambient_mesh,
    check_slices,
    describe_mesh,
    device_line,
    make_mesh,
    pass_rows,
    slices_of,
)
from phi3_jax.parallel.sharding import constrain
from phi3_jax.system.errors import InputError
from phi3_jax.system.machine import Machine, what_is_missing


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


def test_a_cpu_is_said_with_what_is_missing(monkeypatch):
    monkeypatch.setattr(mesh, "look_at_machine", lambda: Machine(has_nvidia=True, driver=580))
    said = partial(what_is_missing, environment={}, has_module=lambda name: False)
    monkeypatch.setattr(mesh, "what_is_missing", said)
    is_missing = "no plug-in for it: pip install 'phi3_jax[cuda13]'" in device_line()
    assert is_missing == (jax.default_backend() == "cpu")


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="JAX has a card")
def test_jaxs_own_reason_is_told(monkeypatch):
    monkeypatch.setattr(mesh, "look_at_machine", lambda: Machine(has_nvidia=True))
    monkeypatch.setattr(mesh, "what_is_missing", partial(what_is_missing, environment={}, has_module=lambda name: True))
    assert "could not start its plug-in for it (" in device_line()
    assert "cuda" in device_line().partition("(")[2]


@dataclass(frozen=True)
class Chip:
    """What a mesh asks of a TPU's chip."""

    id: int
    coords: tuple[int, int, int]
    slice_index: int
    process_index: int
    platform: str = "tpu"
    device_kind: str = "TPU v5 lite"
    core_on_chip: int = 0


def chips(sides, slices):
    """Of v5e, on hosts of 2x2."""
    places = [(x, y) for x in range(sides[0]) for y in range(sides[1])]
    return [
        Chip(n * len(places) + i, (x, y, 0), n, n * len(places) + x // 2 * sides[1] + y // 2)
        for n in range(slices)
        for i, (x, y) in enumerate(places)
    ]


@pytest.mark.parametrize("axes", [{"data": 2, "fsdp": 16}, {"data": -1, "fsdp": 4, "context": 2}])
def test_only_copies_lie_between_slices(axes):
    devices = chips((4, 4), 2)
    assert slices_of(devices) == 2
    grid = make_mesh(axes, devices).devices
    assert sorted(chip.id for chip in grid.flat) == list(range(32))
    for copy in grid:
        assert len({chip.slice_index for chip in copy.flat}) == 1
    assert {chip.slice_index for chip in grid[:, 0].flat} == {0, 1}


@pytest.mark.parametrize(("axes", "slices"), [({"fsdp": -1}, 2), ({"data": 2, "fsdp": -1}, 4)])
def test_other_axes_between_slices_are_refused(axes, slices):
    with pytest.raises(InputError, match=f"there are {slices} slices.*give parallel.data {slices}"):
        make_mesh(axes, chips((2, 2), slices))
    check_slices({"data": 2 * slices}, slices)


def test_slices_of_different_sizes_are_refused_in_a_line():
    devices = [*chips((2, 4), 1), *(Chip(100 + i, (i, 0, 0), 1, 9) for i in range(4))]
    with pytest.raises(InputError, match="parallel: data 2, fsdp 6, .* cannot be laid out on 2 slices") as caught:
        make_mesh({"data": 2, "fsdp": 6}, devices)
    assert "\n" not in str(caught.value)
