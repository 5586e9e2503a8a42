"""The peaks of devices: by exact kind, each with its source, and none for what is not known."""

import pytest

from phi3_jax.parallel.hardware import GB, HARDWARE, GiB, hardware
from phi3_jax.performance.topology import GPUS, TPUS


@pytest.mark.parametrize(
    ("kind", "teraflops", "gigabytes_a_second", "memory"),
    [
        ("NVIDIA L4", 121, 300, 24 * GB),
        ("NVIDIA L40", 181, 864, 48 * GB),
        ("NVIDIA L40S", 362, 864, 48 * GB),
        ("NVIDIA H100 80GB HBM3", 989, 3350, 80 * GB),
        ("NVIDIA H100 PCIe", 756, 2000, 80 * GB),
        ("NVIDIA H100 NVL", 835.5, 3900, 94 * GB),
        ("NVIDIA A100-SXM4-40GB", 312, 1555, 40 * GB),
        ("NVIDIA A100-SXM4-80GB", 312, 2039, 80 * GB),
        ("NVIDIA B200", 2250, 7700, 180 * GB),
        ("NVIDIA GeForce RTX 5090", 209.5, 1792, 32 * GB),
        ("NVIDIA A10", 125, 600, 24 * GB),
        ("NVIDIA RTX A6000", 154.8, 768, 48 * GB),
        ("Tesla T4", 65, 320, 16 * GB),
        ("TPU v4", 275, 1200, 32 * GiB),
        ("TPU v5", 459, 2765, 95 * GiB),
        ("TPU v5p", 459, 2765, 95 * GiB),
        ("TPU v5 lite", 197, 819, 16 * GiB),
        ("TPU7x", 1153.5, 3690, 96 * GiB),  # a device is one of a chip's two cores
    ],
)
def test_figures_are_those_of_the_exact_kind(kind, teraflops, gigabytes_a_second, memory):
    found = hardware(kind)
    assert found is not None
    assert found.flops == pytest.approx(teraflops * 1e12)
    assert found.bandwidth == pytest.approx(gigabytes_a_second * 1e9)
    assert found.memory == memory


@pytest.mark.parametrize("kind", ["cpu", "NVIDIA L400", "NVIDIA H100", "NVIDIA H800", "TPU v4 lite", "TPU v50", ""])
def test_a_kind_that_is_not_known_has_no_figures(kind):
    assert hardware(kind) is None


def test_the_device_here_is_looked_up_where_no_kind_is_given():
    assert hardware() is None  # a CPU


def test_every_figure_has_a_source_and_every_topology_its_figures():
    assert all(entry.source and min(entry.flops, entry.bandwidth, entry.memory) > 0 for entry in HARDWARE.values())
    assert set(GPUS.values()) <= HARDWARE.keys()
    assert {kind for kind, _ in TPUS.values()} <= HARDWARE.keys()
    # What XLA lets a program use is about what there is: 95.74 GiB of "95 GB" is the most.
    assert all(0.9 < limit / HARDWARE[kind].memory < 1.01 for kind, limit in TPUS.values())
