"""The insides of Orbax and TensorStore are still as this package takes them to be."""

import errno

import jax
import jax.numpy as jnp
import pytest
import tensorstore
from orbax.checkpoint import v1 as ocp

from phi3_jax.system.compat_orbax import context_with_json, disk_error, load_arrays


def test_a_dict_of_numbers_is_written_as_json(tmp_path):
    said = {"step": 3, "loss": 0.5, "rows": [1, 2], "best": None}
    with context_with_json("said"):
        ocp.save_checkpointables(tmp_path / "it", {"said": said, "arrays": {"x": jnp.ones(2)}})
        assert ocp.load_checkpointables(tmp_path / "it", {"said": None})["said"] == said


def test_some_of_the_arrays_are_read_by_name(tmp_path):
    ocp.save_checkpointables(tmp_path / "it", {"arrays": {"x": jnp.ones(2), "y": jnp.zeros(3)}, "other": {"z": 1}})
    shape = jax.ShapeDtypeStruct((2,), jnp.float32)
    (name, array), *others = load_arrays(tmp_path / "it", "arrays", {"x": shape}).items()
    assert (name, array.tolist(), others) == ("x", [1.0, 1.0], [])
    for wanted in ({"w": shape}, {"x": jax.ShapeDtypeStruct((5,), jnp.float32)}):
        with pytest.raises(ValueError, match="arrays has"):
            load_arrays(tmp_path / "it", "arrays", wanted)


def test_the_number_of_an_error_stands_in_tensorstores_text(tmp_path):
    (tmp_path / "file").write_text("no folder")
    spec = {"driver": "zarr", "kvstore": {"driver": "file", "path": f"{tmp_path}/file/array"}}
    with pytest.raises(ValueError, match="os_error_code") as raised:
        tensorstore.open(spec, create=True, dtype=tensorstore.float32, shape=[4]).result()
    found = disk_error(raised.value)
    assert isinstance(found, OSError)
    assert found.errno == errno.ENOTDIR


def test_other_errors_are_none_of_the_disks():
    assert disk_error(ValueError("shapes differ")) is None
    full = OSError(errno.ENOSPC, "full")
    assert disk_error(full) is full
    assert disk_error(KeyError("os_error_code='28'")) is None
