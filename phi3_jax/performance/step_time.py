"""How long a step takes: what it computes, by the share of a peak that such programs reach."""

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from phi3_jax.config.model import Phi3Config
from phi3_jax.config.run import RunConfig
from phi3_jax.model.products import project
from phi3_jax.parallel.hardware import Hardware, hardware
from phi3_jax.parallel.mesh import pass_rows
from phi3_jax.performance.cost import StepCost
from phi3_jax.performance.topology import Topology
from phi3_jax.performance.tpu_time import MARGIN, DeviceWork, compiled_seconds, reckoned_seconds
from phi3_jax.training.flops import matmul_parameters, step_flops

# Shares of the dense bfloat16 peak, of all that is computed. Published: NeMo AutoModel, LoRA of
# Llama-3-8B on one H100, 4,096 tokens, 402 TFLOP/s, 41%; MaxText, pre-training Llama-3.1-8B on v6e, 45%.
UTILISATION = (0.35, 0.55)
# Making quantised weights dense adds to a step at most this share of its time.
DEQUANTISING = 0.35
# Shares of the speed of one large linear layer, on a CPU.
CPU_UTILISATION = (0.2, 0.7)


@dataclass(frozen=True)
class StepTime:
    """What a step computes, and how long that takes.

    Attributes:
        flops_per_token: Of the mathematics.
        computed_per_token: With what is computed twice.
        tokens: In a step, over all devices.
        seconds: Of a step, the least and the most, None where there is nothing to tell it from.
        basis: What that is.
    """

    flops_per_token: float
    computed_per_token: float
    tokens: int
    seconds: tuple[float, float] | None
    basis: str

    @property
    def tokens_per_second(self) -> tuple[float, float] | None:
        """Over all devices, the least and the most."""
        return None if self.seconds is None else (self.tokens / self.seconds[1], self.tokens / self.seconds[0])


def step_time(
    run: RunConfig,
    config: Phi3Config,
    mesh: Mapping[str, int],
    trainable: int,
    topology: Topology,
    cost: StepCost | None = None,
) -> StepTime:
    """The time of one optimizer step, with full rows of a single document each.

    Args:
        run: All of it.
        config: The checkpoint's.
        topology: The devices.
        mesh: The size of each axis.
        trainable: How many parameters train.
        cost: What the compiled step costs, where it was compiled.
    """
    length, training = run.data.limit, run.training
    rows = training.gradient_accumulation_steps * pass_rows(training.per_device_train_batch_size, mesh)
    attended = float(np.minimum(np.arange(length) + 1.0, config.sliding_window or np.inf).sum())
    flops = step_flops(config, trainable, run.peft.full_finetuning, length, attended) / length
    computed = flops + _computed_again(run, config, trainable, attended / length)
    peaks = hardware(topology.device_kind) if topology.platform == "tpu" and run.model.dtype != "float32" else None
    if peaks is not None:
        scores = _scores(config, attended / length)
        devices = math.prod(mesh.values())
        work = DeviceWork(
            tokens=rows * length / devices,
            passes=training.gradient_accumulation_steps,
            products=rows * length * (computed - _attention(run, scores, kept=3.0)) / devices,
            attention=rows * length * _attention(run, scores, kept=3.5) / devices,
        )
        return StepTime(flops, computed, rows * length, *_on_tpus(run, config, work, topology.device_kind, peaks, cost))
    rate, shares, basis = _rate(run, topology)
    seconds = None
    if rate is not None:
        least, most = (
            rows * length * computed / (rate * math.prod(mesh.values()) * share) for share in reversed(shares)
        )
        seconds = least, most * (1 + DEQUANTISING if run.model.quantization else 1)
    return StepTime(flops, computed, rows * length, seconds, basis)


def _on_tpus(
    run: RunConfig, config: Phi3Config, work: DeviceWork, kind: str, peaks: Hardware, cost: StepCost | None
) -> tuple[tuple[float, float], str]:
    """The range, and its basis."""
    if cost is not None:
        least = compiled_seconds(cost, work, peaks)
        basis = "XLA's estimate of the compiled program, attention by its products and what devices wait for by bytes"
    else:
        least = reckoned_seconds(run, config, work, kind, peaks)
        basis = "products and traffic, by figures fitted to compiled programs; what devices send one another left out"
    return (least, least * (1 + MARGIN)), f"{basis}, to {MARGIN:.0%} more; not measured on a TPU"


def _scores(config: Phi3Config, attended: float) -> float:
    """FLOP a token of attention's two products, forwards."""
    return 4.0 * config.num_hidden_layers * config.num_attention_heads * config.head_dim * attended


def _attention(run: RunConfig, scores: float, kept: float) -> float:
    """FLOP a token of attention in a step, which forwards and backwards takes `kept` times the scores."""
    again = run.training.remat not in ("none", "dots", "attention")
    return scores * (kept + again)


def _computed_again(run: RunConfig, config: Phi3Config, trainable: int, attended: float) -> float:
    """FLOP a token of the second forward pass that rematerialisation makes."""
    policy = run.training.remat
    if policy in ("none", "dots"):
        return 0.0
    weights = matmul_parameters(config) - config.vocab_size * config.hidden_size
    adapter = 0 if run.peft.full_finetuning else trainable
    scores = _scores(config, attended)
    return 2.0 * (weights + adapter) + (0.0 if policy == "attention" else scores)


def _rate(run: RunConfig, topology: Topology) -> tuple[float | None, tuple[float, float], str]:
    if topology.platform == "cpu":
        rate, shares = _product_speed(run.model.dtype) / topology.devices, CPU_UTILISATION
        what = f"the {rate * topology.devices / 1e9:,.0f} GFLOP/s of a linear layer in {run.model.dtype} here"
        return rate, shares, f"{_percent(shares)} of {what}, recomputation counted"
    if run.model.dtype == "float32":
        return None, UTILISATION, "no basis: peaks are known for bfloat16 and float16; give model.dtype bfloat16"
    peaks, shares = hardware(topology.device_kind), UTILISATION
    if peaks is None:
        return None, shares, f"no basis: plan knows no peak of {topology.device_kind}"
    peak = peaks.flops
    if peaks.float32 is not None and run.model.dtype == "bfloat16":
        peak = peaks.float32
    basis = (
        f"{_percent(shares)} of the peak of {peak / 1e12:,.3g} TFLOP/s a device, recomputation counted and "
        "communication not; published: 41% (LoRA of Llama-3-8B, one H100, NeMo AutoModel), 45% (Llama-3.1-8B, v6e, "
        "MaxText)"
    )
    return peak, shares, basis + ("; up to 35% longer for dequantising" if run.model.quantization else "")


def _percent(shares: tuple[float, float]) -> str:
    return f"{shares[0]:.0%} to {shares[1]:.0%}"


def _product_speed(dtype: str) -> float:
    """FLOP/s of a linear layer of a thousand tokens, on all cores of this machine."""
    tokens, columns, rows = 1024, 1024, 4096
    x, weight = jnp.ones((tokens, columns), dtype), jnp.ones((rows, columns), dtype)
    product = jax.jit(project)
    product(x, weight).block_until_ready()
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        product(x, weight).block_until_ready()
        seconds.append(time.perf_counter() - start)
    return 2 * tokens * columns * rows / min(seconds)
