"""Devices by their names."""

from dataclasses import dataclass

import jax
import pytest

from phi3_jax.performance.topology import GPUS, JAX_GPU_SHARE, OTHER_NAMES, larger, parse_topology, topology_of
from phi3_jax.system.errors import InputError

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
        ("gpu:t4", "gpu", 1, 16 * GB),
        ("gpu:rtx5090:2", "gpu", 2, 32 * GB),
        ("gpu:24GB", "gpu", 1, 24 * GB),
        ("gpu:rtx4090", "gpu", 1, 24 * GB),
        ("rtx4090x2", "gpu", 2, 24 * GB),
        ("gpu:3090", "gpu", 1, 24 * GB),
        ("A100-80GB", "gpu", 1, 80 * GB),
        ("RTX-A6000", "gpu", 1, 48 * GB),
        ("gpu:80gib:4", "gpu", 4, 80 * GiB),
        # Google's numbers are of chips or, where a chip has two cores, of cores.
        ("v5litepod-8", "tpu", 8, 15.75 * GiB),
        ("v5e-1", "tpu", 1, 15.75 * GiB),
        ("v6e-8", "tpu", 8, 31.25 * GiB),
        ("v5p-8", "tpu", 4, 95.74 * GiB),
        ("v4-64", "tpu", 32, 30.75 * GiB),
        # Several slices.
        ("v5e:4x4:2", "tpu", 32, 15.75 * GiB),
        ("v6e-64:4", "tpu", 256, 31.25 * GiB),
    ],
)
def test_topologies(name, platform, devices, limit):
    found = parse_topology(name)
    assert (found.platform, found.devices, found.hbm) == (platform, devices, int(limit))


def test_googles_names_are_slices_of_its_shapes():
    shapes = {"v5litepod-8": (2, 4), "v6e-16": (4, 4), "v5p-8": (2, 2, 1), "v5p-128": (4, 4, 4), "v4-32": (2, 2, 4)}
    assert {name: parse_topology(name).bounds for name in shapes} == shapes
    assert (parse_topology("v5litepod-16:3").bounds, parse_topology("v5litepod-16:3").slices) == ((4, 4), 3)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("v5litepod-6", ("v5litepod-4", "v5litepod-8")),
        ("v5p-4", ("two a chip", "v5p-8")),
        ("gpu:24", ("24GB", "rtx4090")),
        ("gpu:0GB", ("24GB",)),
        ("v7x-8", ("v5litepod-8", "gpu:KIND")),
    ],
)
def test_what_is_no_topology_is_told_those_that_there_are(name, words):
    with pytest.raises(InputError) as error:
        parse_topology(name)
    assert all(word in str(error.value) for word in (name, *words)), error.value


def test_every_kind_of_gpu_is_found_under_all_its_names():
    for kind, device in GPUS.items():
        assert (parse_topology(f"gpu:{kind}").device_kind, parse_topology(f"gpu:{kind}:2").devices) == (device, 2)
    assert set(OTHER_NAMES.values()) <= GPUS.keys()
    assert not OTHER_NAMES.keys() & GPUS.keys()


def test_here_is_this_machine():
    assert parse_topology("here").platform == jax.default_backend()


@dataclass(frozen=True)
class Stub:
    """A device that is not here."""

    platform: str
    device_kind: str

    def memory_stats(self):
        return {"bytes_limit": 9 * GB}


@pytest.mark.parametrize(
    ("device", "number", "name", "hbm"),
    [
        (Stub("gpu", "NVIDIA GeForce RTX 4090"), 2, "gpu:rtx4090:2", 24 * GB),
        (Stub("gpu", "NVIDIA GeForce RTX 4070"), 1, "here", 12 * GB),  # JAX takes 75%
        (Stub("tpu", "TPU v5 lite"), 8, "v5e:2x4", 15.75 * GiB),
        (Stub("tpu", "TPU v4"), 4, "v4:2x2x1", 30.75 * GiB),
    ],
)
def test_here_is_what_jax_sees(monkeypatch, device, number, name, hbm):
    monkeypatch.setattr("jax.local_devices", lambda: [device] * number)
    found = parse_topology("here")
    assert (found.name, found.devices, found.hbm, found.device_kind) == (name, number, hbm, device.device_kind)


def test_a_run_has_what_jax_lets_arrays_take_now():
    rtx, v4 = Stub("gpu", "NVIDIA GeForce RTX 4090"), Stub("tpu", "TPU v4")
    assert topology_of([rtx, rtx]).hbm * JAX_GPU_SHARE == 9 * GB
    assert (topology_of([v4] * 8).hbm, topology_of([v4] * 8).devices, topology_of([v4]).slices) == (9 * GB, 8, 1)


def test_tpus_of_which_nothing_is_known_are_named(monkeypatch):
    monkeypatch.setattr("jax.local_devices", lambda: [Stub("tpu", "TPU v9")])
    with pytest.raises(InputError, match="no figures for 1 x TPU v9"):
        parse_topology("here")


@pytest.mark.parametrize(
    ("name", "first"), [("gpu:24GB", "gpu:24GB:2"), ("gpu:9GiB", "gpu:9GiB:2"), ("v6e-1", "v6e:2x2")]
)
def test_more_of_the_same_devices_have_names(name, first):
    found = larger(parse_topology(name))
    assert found[0][0] == first
    assert all(parse_topology(other).hbm == parse_topology(name).hbm for other, _ in found)
