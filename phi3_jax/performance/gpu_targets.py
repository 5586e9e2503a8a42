"""NVIDIA cards as XLA's compiler knows them, so that it can compile for one that is not here.

A card is described by a `GpuTargetConfigProto` in text form. What all cards of a compute capability have in common is
in NVIDIA's CUDA C++ Programming Guide, "Technical Specifications per Compute Capability"; the rest says each card's
source. Memory and its bandwidth are those of `parallel.hardware`.
"""

from dataclasses import dataclass

from phi3_jax.parallel.hardware import HARDWARE

_KiB, _MiB = 2**10, 2**20


@dataclass(frozen=True)
class _Capability:
    """What a compute capability has in each multiprocessor.

    Attributes:
        threads: That it holds at once.
        lanes: For float32.
        shared: Bytes of shared memory.
        shared_per_block: Of them, the most that a block may have.
    """

    threads: int
    lanes: int
    shared: int
    shared_per_block: int


_CAPABILITIES = {
    (7, 0): _Capability(2048, 64, 96 * _KiB, 96 * _KiB),
    (7, 5): _Capability(1024, 64, 64 * _KiB, 64 * _KiB),
    (8, 0): _Capability(2048, 64, 164 * _KiB, 163 * _KiB),
    (8, 6): _Capability(1536, 128, 100 * _KiB, 99 * _KiB),
    (8, 9): _Capability(1536, 128, 100 * _KiB, 99 * _KiB),
    (9, 0): _Capability(2048, 128, 228 * _KiB, 227 * _KiB),
    (10, 0): _Capability(2048, 128, 228 * _KiB, 227 * _KiB),
    (12, 0): _Capability(1536, 128, 100 * _KiB, 99 * _KiB),
}


@dataclass(frozen=True)
class _Card:
    """A kind of card.

    Attributes:
        capability: Its compute capability.
        cores: Multiprocessors.
        l2: Bytes of its second-level cache.
        clock: Boost, in GHz.
        source: Where these stand.
    """

    capability: tuple[int, int]
    cores: int
    l2: int
    clock: float
    source: str


_XLA = "openxla/xla, xla/backends/gpu/target_config/specs/{}.txtpb, as read from the card"
_ADA = "NVIDIA Ada GPU Architecture white paper, appendix A"
_GA102 = "NVIDIA Ampere GA102 white paper, appendix A"
_ADA_SHEET = "NVIDIA {} data sheet; the chip AD102 of the Ada white paper"
_HOPPER_NVL = "NVIDIA {} product brief; the chip of h100_pcie.txtpb of openxla/xla with 132 multiprocessors"

_CARDS = {
    "NVIDIA B200": _Card((10, 0), 148, 132644864, 1.965, _XLA.format("b200")),
    "NVIDIA H200": _Card((9, 0), 132, 50 * _MiB, 1.98, _XLA.format("h200")),
    "NVIDIA H200 NVL": _Card((9, 0), 132, 50 * _MiB, 1.785, _HOPPER_NVL.format("H200 NVL")),
    "NVIDIA H100 80GB HBM3": _Card((9, 0), 132, 50 * _MiB, 1.98, _XLA.format("h100_sxm")),
    "NVIDIA H100 NVL": _Card((9, 0), 132, 50 * _MiB, 1.785, _HOPPER_NVL.format("H100 NVL")),
    "NVIDIA H100 PCIe": _Card((9, 0), 114, 50 * _MiB, 1.755, _XLA.format("h100_pcie")),
    "NVIDIA A100-SXM4-80GB": _Card((8, 0), 108, 40 * _MiB, 1.41, _XLA.format("a100_sxm_80")),
    "NVIDIA A100-SXM4-40GB": _Card((8, 0), 108, 40 * _MiB, 1.41, _XLA.format("a100_sxm_40")),
    "NVIDIA A100 80GB PCIe": _Card((8, 0), 108, 40 * _MiB, 1.41, _XLA.format("a100_pcie_80")),
    "NVIDIA A100-PCIE-40GB": _Card((8, 0), 108, 40 * _MiB, 1.41, "NVIDIA A100 white paper, table 3"),
    "NVIDIA A10G": _Card((8, 6), 80, 6 * _MiB, 1.71, "deviceQuery of an AWS g5; NVIDIA's own sheet does not say"),
    "NVIDIA A10": _Card((8, 6), 72, 6 * _MiB, 1.695, "NVIDIA A10 product brief; GA102 of the Ampere white paper"),
    "NVIDIA L40S": _Card((8, 9), 142, 96 * _MiB, 2.52, _ADA_SHEET.format("L40S")),
    "NVIDIA L40": _Card((8, 9), 142, 96 * _MiB, 2.49, _ADA_SHEET.format("L40")),
    "NVIDIA L4": _Card((8, 9), 58, 48 * _MiB, 2.04, "NVIDIA L4 product brief; the chip AD104 of the Ada white paper"),
    "NVIDIA RTX 6000 Ada Generation": _Card((8, 9), 142, 96 * _MiB, 2.505, _ADA),
    "NVIDIA RTX A6000": _Card((8, 6), 84, 6 * _MiB, 1.8, _XLA.format("a6000")),
    "NVIDIA GeForce RTX 5090": _Card(
        (12, 0), 170, 96 * _MiB, 2.407, "NVIDIA RTX Blackwell GPU Architecture white paper, appendix A"
    ),
    "NVIDIA GeForce RTX 4090": _Card((8, 9), 128, 72 * _MiB, 2.52, _ADA),
    "NVIDIA GeForce RTX 3090": _Card((8, 6), 82, 6 * _MiB, 1.695, _GA102),
    "Tesla T4": _Card((7, 5), 40, 4 * _MiB, 1.59, "NVIDIA Turing GPU Architecture white paper, appendix A"),
    "Tesla V100-SXM2-16GB": _Card((7, 0), 80, 6 * _MiB, 1.53, _XLA.format("v100")),
    "Tesla V100-SXM2-32GB": _Card((7, 0), 80, 6 * _MiB, 1.53, "NVIDIA V100 data sheet; v100.txtpb of openxla/xla"),
    "Tesla V100-PCIE-16GB": _Card((7, 0), 80, 6 * _MiB, 1.38, "NVIDIA V100 data sheet; v100.txtpb of openxla/xla"),
    "Tesla V100-PCIE-32GB": _Card((7, 0), 80, 6 * _MiB, 1.38, "NVIDIA V100 data sheet; v100.txtpb of openxla/xla"),
}
# What the libraries at run time are taken to be, which decides what XLA may ask of them: the oldest cuDNN that JAX's
# plug-in takes, and the CUDA that it is built with.
_LIBRARIES = 'dnn_version_info { major: 9 minor: 8 } runtime_version { major: 12 minor: 8 } platform_name: "CUDA"'


def compute_capability(device_kind: str) -> tuple[int, int] | None:
    """That of a kind of card, as JAX calls it; None of one that is not in the table.

    Example:
        >>> compute_capability("NVIDIA L4")
        (8, 9)
    """
    card = _CARDS.get(device_kind)
    return None if card is None else card.capability


def target_config(device_kind: str) -> str | None:
    """The card as a `GpuTargetConfigProto` in text form; None of one that is not in the table.

    Args:
        device_kind: As JAX calls it.

    Example:
        >>> "core_count: 132" in target_config("NVIDIA H100 80GB HBM3")
        True
    """
    card, peaks = _CARDS.get(device_kind), HARDWARE.get(device_kind)
    if card is None or peaks is None:
        return None
    common, (major, minor) = _CAPABILITIES[card.capability], card.capability
    return f"""
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: {common.threads}
  shared_memory_per_block: {48 * _KiB} shared_memory_per_core: {common.shared}
  shared_memory_per_block_optin: {common.shared_per_block}
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
  cuda_compute_capability {{ major: {major} minor: {minor} }}
  core_count: {card.cores} fpus_per_core: {common.lanes} clock_rate_ghz: {card.clock} l2_cache_size: {card.l2}
  memory_bandwidth: {int(peaks.bandwidth)} device_memory_size: {peaks.memory}
}}
{_LIBRARIES}
device_description_str: "{device_kind}"
"""
