"""Devices by their names."""

import pytest

from phi3_jax.performance.topology import parse_topology

GB, GiB = 10**9, 2**30


@pytest.mark.parametrize(
    ("name", "platform", "devices", "limit"),
    [
        ("gpu:h100", "gpu", 1, 80 * GB),
        ("gpu:a100-40gb:8", "gpu", 8, 40 * GB),
        ("gpu:h100x8", "gpu", 8, 80 * GB),
        ("v5e:4x4", "tpu", 16, 15.75 * GiB),
        ("v6e:1x1", "tpu", 1, 31.25 * GiB),
        ("v5p:2x2x4", "tpu", 16, 95.74 * GiB),
        ("V4:2x2x2", "tpu", 8, 30.75 * GiB),
    ],
)
def test_topologies(name, platform, devices, limit):
    found = parse_topology(name)
    assert (found.platform, found.devices, found.hbm) == (platform, devices, int(limit))
