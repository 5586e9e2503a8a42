"""The devices that share a piece of work."""

import jax
import numpy as np

from phi3_jax.parallel.devices import Devices
from phi3_jax.parallel.mesh import make_mesh


def test_one_device_has_all():
    devices = Devices(make_mesh({}, jax.devices()[:1]))
    assert (devices.batch_size(3), devices.rows_here(3)) == (3, None)
    batch = {"input_ids": np.arange(6, dtype=np.int32).reshape(2, 3)}
    put = devices.put(batch, 2)
    assert isinstance(put["input_ids"], jax.Array)
    np.testing.assert_array_equal(put["input_ids"], batch["input_ids"])
