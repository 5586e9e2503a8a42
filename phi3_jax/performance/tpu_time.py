"""How long a step takes on TPUs: by the compiled program, or where there is none by its products and what they move.

Nothing here has been measured. Of a compiled program XLA's own estimate of every instruction is summed, and beside it
stand the two of which it has none: attention, whose kernel is written in Pallas, and what devices wait for while
they send. Without a compiler the sum is reckoned from products and traffic, by figures that are fitted to the
compiled programs of docs/benchmarks.md.
"""

from dataclasses import dataclass

from phi3_jax.config.model import Phi3Config
from phi3_jax.config.run import RunConfig
from phi3_jax.parallel.hardware import Hardware
from phi3_jax.performance.cost import StepCost, seconds_waited

# FLOP a cycle of attention's kernels, over the pairs of positions that see each other: libtpu's schedules of splash
# have 50,000 (v5e) and 72,000 (v6e) for heads of 96 and rows of 2,048. Blocks at the edge count whole there.
ATTENTION_PER_CYCLE = 6e4
# The share of the peak of a product in a kernel of its own.
KERNEL_SHARE = 0.8
# How far above the reckoning the slow end of the range is.
MARGIN = 0.25

# Fitted to the compiled programs of docs/benchmarks.md, by which they are held to 25%: the share of the peak that
# XLA's estimate gives the base's products, by device;
PRODUCTS_SHARE = {"TPU v5 lite": 0.95, "TPU v6 lite": 0.67}
OTHER_SHARE = 0.8
# how many numbers a step goes over for each token and layer, in the hidden and in the MLP's inner size, and with
# dropout besides;
HIDDEN_PASSES, INNER_PASSES, DROPOUT_PASSES = 60.0, 14.0, 5.0
# how often each of these is moved, in 16 bits, and how many of them go through in a cycle;
MOVES, PER_CYCLE = 1.5, 130.0
# and how many of a quantised weight's numbers are made dense in a cycle, three times in a pass.
DEQUANTISED_PER_CYCLE = 60.0


@dataclass(frozen=True)
class DeviceWork:
    """What one device does in a step.

    Attributes:
        tokens: That it passes through all layers.
        passes: Forward and backward passes of micro-batches.
        products: FLOP of products with weights, recomputed ones too.
        attention: FLOP of attention over the pairs of positions that see each other, recomputed ones too.
    """

    tokens: float
    passes: int
    products: float
    attention: float


def compiled_seconds(cost: StepCost, work: DeviceWork, peaks: Hardware) -> float:
    """Seconds of a step by its compiled program.

    Example:
        >>> from phi3_jax.parallel.hardware import HARDWARE
        >>> from phi3_jax.performance.cost import Work
        >>> cost = StepCost({"base products": Work(seconds=1.0)}, waited_bytes=0.2e12)
        >>> work = DeviceWork(tokens=8192, passes=1, products=1e14, attention=0.0)
        >>> compiled_seconds(cost, work, HARDWARE["TPU v5 lite"])
        2.0
    """
    kernels = sum(cost.kernel_flops.values()) / (peaks.flops * KERNEL_SHARE)
    return cost.seconds + kernels + _attention_seconds(work, peaks) + seconds_waited(cost, peaks)


def reckoned_seconds(run: RunConfig, config: Phi3Config, work: DeviceWork, kind: str, peaks: Hardware) -> float:
    """Seconds of a step where nothing is compiled.

    Args:
        run: All of it.
        config: The checkpoint's.
        work: What one device does.
        kind: JAX's `device_kind`.
        peaks: The device's.
    """
    widths = HIDDEN_PASSES * config.hidden_size + INNER_PASSES * config.intermediate_size
    if run.peft.lora_dropout and not run.peft.full_finetuning:
        widths += DROPOUT_PASSES * config.hidden_size
    numbers = widths * config.num_hidden_layers * work.tokens
    dense = 3.0 * work.passes * _weights(config) if run.model.quantization else 0.0
    cycles = numbers / PER_CYCLE + dense / DEQUANTISED_PER_CYCLE
    products = work.products / (peaks.flops * PRODUCTS_SHARE.get(kind, OTHER_SHARE))
    return products + 2 * MOVES * numbers / peaks.bandwidth + cycles / _clock(peaks) + _attention_seconds(work, peaks)


def _attention_seconds(work: DeviceWork, peaks: Hardware) -> float:
    return work.attention / ATTENTION_PER_CYCLE / _clock(peaks)


def _clock(peaks: Hardware) -> float:
    return peaks.clock or 1.5e9  # of TPUs that the table has none of


def _weights(config: Phi3Config) -> int:
    """Of the linear layers that are quantised."""
    width = config.num_attention_heads * config.head_dim
    layer = config.hidden_size * (sum(config.qkv_sizes) + width + 3 * config.intermediate_size)
    return config.num_hidden_layers * layer
