"""What each kind of device can do at most: arithmetic, memory bandwidth and memory, by the maker's own figures.

Kinds are looked up by JAX's exact `device_kind`: an L40 is no L4, and an H100 for PCIe does less than one for SXM.
A kind that is not in the table has no figures, rather than those of a neighbour.
"""

from dataclasses import dataclass

import jax

GB, GiB = 10**9, 2**30


@dataclass(frozen=True)
class Hardware:
    """The peaks of one device, as JAX counts devices.

    Attributes:
        flops: FLOP/s of dense bfloat16 matrix products with sums in float32; of float16 where the device has no
            bfloat16 (T4, V100). Where a maker gives a figure with sparsity alone, half of it.
        bandwidth: bytes/s of its memory.
        memory: bytes of its memory.
        source: where the figures stand.
        float32: FLOP/s in float32 of a device that has no bfloat16, in which XLA then multiplies bfloat16; None of
            the others.
        interconnect: bytes/s that a device sends to those it is wired to, all links together, in one direction: half
            of what a maker calls bidirectional. None where it is not in the table.
        clock: Hz of the matrix units, at which compilers count cycles: the peak by the number of their multipliers.
            None where it is not in the table.
    """

    flops: float
    bandwidth: float
    memory: int
    source: str
    float32: float | None = None
    interconnect: float | None = None
    clock: float | None = None


_AMPERE = "NVIDIA A100 data sheet, system specifications"
_HOPPER = "NVIDIA H100 data sheet, technical specifications, half of what is given with sparsity"
_H200 = "NVIDIA H200 data sheet, specifications, half of what is given with sparsity"
_ADA = "NVIDIA Ada GPU Architecture white paper, appendix A, bfloat16, without sparsity"
_GA102 = "NVIDIA Ampere GA102 white paper, appendix A, bfloat16, without sparsity"
_VOLTA = "NVIDIA V100 data sheet, specifications, deep learning (float16)"
_TPU = "Google Cloud documentation, {}, table of key specifications"
# Of these a chip is two devices, one for each of its cores; of other TPUs a chip is one.
_TPU_CORE = _TPU + ", half a chip"

HARDWARE: dict[str, Hardware] = {
    "NVIDIA B200": Hardware(
        2250e12, 7.7e12, 180 * GB, "NVIDIA Blackwell data sheet, HGX B200, a single GPU, half of what has sparsity"
    ),
    "NVIDIA H200": Hardware(989e12, 4.8e12, 141 * GB, f"{_H200}, column SXM"),
    "NVIDIA H200 NVL": Hardware(835.5e12, 4.8e12, 141 * GB, f"{_H200}, column NVL"),
    "NVIDIA H100 80GB HBM3": Hardware(989e12, 3.35e12, 80 * GB, f"{_HOPPER}, column SXM"),
    "NVIDIA H100 NVL": Hardware(835.5e12, 3.9e12, 94 * GB, f"{_HOPPER}, column NVL"),
    "NVIDIA H100 PCIe": Hardware(756e12, 2.0e12, 80 * GB, f"{_HOPPER}, edition of 2022, column PCIe"),
    "NVIDIA A100-SXM4-80GB": Hardware(312e12, 2.039e12, 80 * GB, f"{_AMPERE}, column 80GB SXM"),
    "NVIDIA A100-SXM4-40GB": Hardware(312e12, 1.555e12, 40 * GB, f"{_AMPERE}, edition of 2021, column 40GB SXM"),
    "NVIDIA A100 80GB PCIe": Hardware(312e12, 1.935e12, 80 * GB, f"{_AMPERE}, column 80GB PCIe"),
    "NVIDIA A100-PCIE-40GB": Hardware(312e12, 1.555e12, 40 * GB, f"{_AMPERE}, edition of 2021, column 40GB PCIe"),
    "NVIDIA A10G": Hardware(70e12, 0.6e12, 24 * GB, "NVIDIA A10G data sheet, specifications, without sparsity"),
    "NVIDIA A10": Hardware(125e12, 0.6e12, 24 * GB, "NVIDIA A10 data sheet, specifications, without sparsity"),
    "NVIDIA L40S": Hardware(362e12, 0.864e12, 48 * GB, "NVIDIA L40S data sheet, specifications, no sparsity"),
    "NVIDIA L40": Hardware(181e12, 0.864e12, 48 * GB, "NVIDIA L40 data sheet, specifications, no sparsity"),
    "NVIDIA L4": Hardware(121e12, 0.3e12, 24 * GB, "NVIDIA L4 data sheet, specifications, half with sparsity"),
    "NVIDIA RTX 6000 Ada Generation": Hardware(364.2e12, 0.96e12, 48 * GB, _ADA),
    "NVIDIA RTX A6000": Hardware(154.8e12, 0.768e12, 48 * GB, _GA102),
    "NVIDIA GeForce RTX 5090": Hardware(
        209.5e12,
        1.792e12,
        32 * GB,
        "NVIDIA RTX Blackwell GPU Architecture white paper, appendix A, bfloat16, without sparsity",
    ),
    "NVIDIA GeForce RTX 4090": Hardware(165.2e12, 1.008e12, 24 * GB, _ADA),
    "NVIDIA GeForce RTX 3090": Hardware(71e12, 0.936e12, 24 * GB, _GA102),
    "Tesla T4": Hardware(65e12, 0.32e12, 16 * GB, "NVIDIA T4 data sheet, specifications, mixed precision", 8.1e12),
    "Tesla V100-SXM2-16GB": Hardware(125e12, 0.9e12, 16 * GB, f"{_VOLTA}, column SXM2", 15.7e12),
    "Tesla V100-SXM2-32GB": Hardware(125e12, 0.9e12, 32 * GB, f"{_VOLTA}, column SXM2", 15.7e12),
    "Tesla V100-PCIE-16GB": Hardware(112e12, 0.9e12, 16 * GB, f"{_VOLTA}, column PCIe", 14e12),
    "Tesla V100-PCIE-32GB": Hardware(112e12, 0.9e12, 32 * GB, f"{_VOLTA}, column PCIe", 14e12),
    "TPU v2": Hardware(23e12, 0.35e12, 8 * GiB, _TPU_CORE.format("TPU v2")),
    "TPU v3": Hardware(61.5e12, 0.45e12, 16 * GiB, _TPU_CORE.format("TPU v3")),
    "TPU v4": Hardware(275e12, 1.2e12, 32 * GiB, _TPU.format("TPU v4"), None, 0.3e12, 1.05e9),
    "TPU v5 lite": Hardware(197e12, 0.819e12, 16 * GiB, _TPU.format("TPU v5e"), None, 0.2e12, 1.5e9),
    "TPU v5": Hardware(459e12, 2.765e12, 95 * GiB, _TPU.format("TPU v5p"), None, 0.6e12, 1.75e9),
    "TPU v6 lite": Hardware(918e12, 1.638e12, 32 * GiB, _TPU.format("TPU v6e"), None, 0.4e12, 1.75e9),
    "TPU7x": Hardware(1153.5e12, 3.69e12, 96 * GiB, _TPU_CORE.format("TPU7x (Ironwood)")),
}
# JAX knows these kinds by a second name.
HARDWARE |= {other: HARDWARE[kind] for other, kind in (("TPU v5e", "TPU v5 lite"), ("TPU v5p", "TPU v5"))}
HARDWARE["TPU v6e"] = HARDWARE["TPU v6 lite"]


def hardware(device_kind: str | None = None) -> Hardware | None:
    """The peaks of a kind of device.

    Args:
        device_kind: `jax.Device.device_kind`; that of the first device here where it is left out.

    Returns:
        Its figures, None where it is not in the table.
    """
    return HARDWARE.get(jax.devices()[0].device_kind if device_kind is None else device_kind)
