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

# The share of the peak that splash attention's kernels have of the pairs of positions that are needed, as libtpu's
# schedule of them says (docs/plan.md): it counts blocks at the edge whole, and 96 numbers of a head as 128.
ATTENTION_SHARE = 0.25
# That of a product in a kernel of its own.
KERNEL_SHARE = 0.8
# How far above the reckoning the slow end of the range is.
MARGIN = 0.25

# Fitted to the table of compiled programs: the share of the peak that the base's products have; how often a step
# passes over an array of the hidden size, and over one of the MLP's inner size, for each token and layer, in the
# activations' type; the same passes of dropout; and seconds of making a weight dense by those of reading it so.
PRODUCTS_SHARE = 0.85
HIDDEN_PASSES, INNER_PASSES = 60.0, 14.0
DROPOUT_PASSES = 12.0
DEQUANTISING_PASSES = 6.0


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


def reckoned_seconds(run: RunConfig, config: Phi3Config, work: DeviceWork, peaks: Hardware) -> float:
    """Seconds of a step where nothing is compiled.

    Args:
        run: All of it.
        config: The checkpoint's.
        work: What one device does.
        peaks: The device's.
    """
    products = work.products / (peaks.flops * PRODUCTS_SHARE)
    numbers = HIDDEN_PASSES * config.hidden_size + INNER_PASSES * config.intermediate_size
    if run.peft.lora_dropout and not run.peft.full_finetuning:
        numbers += DROPOUT_PASSES * config.hidden_size
    moved = 2.0 * numbers * config.num_hidden_layers * work.tokens
    if run.model.quantization:
        moved += 2.0 * DEQUANTISING_PASSES * work.passes * _weights(config)
    return products + moved / peaks.bandwidth + _attention_seconds(work, peaks)


def _attention_seconds(work: DeviceWork, peaks: Hardware) -> float:
    return work.attention / (peaks.flops * ATTENTION_SHARE)


def _weights(config: Phi3Config) -> int:
    """Of the linear layers that are quantised."""
    width = config.num_attention_heads * config.head_dim
    layer = config.hidden_size * (sum(config.qkv_sizes) + width + 3 * config.intermediate_size)
    return config.num_hidden_layers * layer
