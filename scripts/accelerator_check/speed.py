"""How fast, beside what the device could do at most: training steps and answers, of random weights of full size."""

import statistics
import time
from collections.abc import Callable
from dataclasses import replace

import jax
import jax.numpy as jnp

from accelerator_check.record import Recorder
from accelerator_check.sizes import Sizes
from phi3_jax.config.run import RunConfig
from phi3_jax.parallel.hardware import hardware
from phi3_jax.parallel.mesh import mesh_shape
from phi3_jax.performance.generate import benchmark_generate
from phi3_jax.performance.memory import Estimator
from phi3_jax.performance.step_time import step_time
from phi3_jax.performance.topology import parse_topology
from phi3_jax.performance.train import benchmark_train
from phi3_jax.performance.weights import random_model
from phi3_jax.system.packages import package_versions
from phi3_jax.training.flops import matmul_parameters

PACKAGES = ("phi3_jax", "jax", "jaxlib", "libtpu", "jax-cuda12-plugin", "jax-cuda13-plugin", "flax")


def look_at_device(sizes: Sizes, recorder: Recorder) -> None:
    """What the device is, and what of its peaks plain programs reach."""
    device, peaks = jax.devices()[0], hardware()
    memory = (device.memory_stats() or {}).get("bytes_limit")
    recorder.note("device", f"{jax.device_count()} x {device.device_kind} ({device.platform})")
    recorder.note("versions", ", ".join(f"{name} {version}" for name, version in package_versions(*PACKAGES).items()))
    recorder.figure("memory that JAX may use", None if memory is None else memory / 2**30, "GiB")
    if peaks is None:
        recorder.note("peaks", f"{device.device_kind} is in no table: shares of the peak are left out")
    side = 8192 if sizes.model.hidden_size > 1024 else 256
    square = jnp.ones((side, side), jnp.bfloat16)
    seconds = timed(jax.jit(lambda x: x @ x), square)
    _share(
        recorder, "product in bfloat16", 2 * side**3 / seconds, 1e12, "TFLOP/s", None if peaks is None else peaks.flops
    )
    many = jnp.ones(64 * side**2 // 16, jnp.bfloat16)
    seconds = timed(jax.jit(lambda x: x + 1), many)
    _share(recorder, "copy", 2 * many.nbytes / seconds, 1e9, "GB/s", None if peaks is None else peaks.bandwidth)


def timed(program: Callable[[jax.Array], jax.Array], x: jax.Array, times: int = 20) -> float:
    """Seconds of one call, the median of a few, after two others."""
    seconds = []
    for _ in range(times + 2):
        start = time.perf_counter()
        jax.block_until_ready(program(x))
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[2:])


def time_training(sizes: Sizes, recorder: Recorder, *, longer: int = 1, quantization: str | None = None) -> None:
    """Steps as a run takes them: r 16 on all linear layers, packed rows, rematerialised.

    Args:
        sizes: Whose model it is.
        recorder: Takes the figures.
        longer: How many times as long rows are, of which there are as many times fewer.
        quantization: Of the base.
    """
    length, rows = sizes.length * longer, max(1, sizes.rows // longer)
    run = RunConfig.from_dict(
        {
            "model": {"name_or_path": "random", "dtype": "bfloat16", "quantization": quantization},
            "peft": {"r": 16, "lora_alpha": 32, "lora_dropout": 0.0, "target_modules": "all-linear"},
            "data": {"max_length": length},
            "training": {"per_device_train_batch_size": rows, "max_steps": 100},
        }
    )
    config = sizes.model
    if length > config.max_position_embeddings:
        config = replace(config, max_position_embeddings=length)
    found = benchmark_train(run, config, steps=sizes.steps, warmup=sizes.warmup, documents=4)
    topology, peaks = parse_topology("here"), hardware()
    mesh = mesh_shape(run.parallel.sizes, 1)
    trainable = int(str(found["trainable_parameters"]))
    computed = step_time(run, config, mesh, trainable, topology).computed_per_token
    speed = _number(found["tokens_per_second"])
    recorder.figure("tokens a second", speed, "", f"{rows} x {length}, on one device")
    recorder.figure("step", _number(found["step_seconds"]), "s", "the median")
    recorder.figure("compiling", _number(found["compile_seconds"]), "s")
    per_second = None if peaks is None else 100 / peaks.flops * speed
    recorder.figure("MFU by 4N", _times(per_second, 4.0 * matmul_parameters(config)), "%", "base products alone")
    recorder.figure("MFU", _times(per_second, _number(found["flops_per_token"])), "%", "adapters and attention too")
    recorder.figure("hardware utilisation", _times(per_second, computed), "%", "what is computed twice too")
    recorder.figure("loss", _number(found["loss"]), "")
    planned = Estimator(config)(run, topology).total
    recorder.figure("memory by plan's estimate", planned / 1e9, "GB")
    if found["memory_kind"] == "device":
        used = _number(found["peak_memory_gb"])
        recorder.figure("memory at most", used, "GB", f"{1e9 * used / planned:.2f} of plan's estimate")
    else:
        recorder.note("memory at most", "not counted by this backend")


def time_decoding(sizes: Sizes, recorder: Recorder, *, batch: int) -> None:
    """Greedy answers to random prompts."""
    model = random_model(sizes.model, dtype="bfloat16")
    found = benchmark_generate(model, None, batch=batch, prompt=sizes.prompt, new_tokens=sizes.answer, rounds=3)
    share = found["bandwidth_utilisation"]
    recorder.figure("tokens a second", _number(found["tokens_per_second"]), "", f"{sizes.answer} tokens, batch {batch}")
    recorder.figure("prompt", _number(found["prompt_seconds"]), "s", f"{batch} of {sizes.prompt} tokens")
    recorder.figure("bandwidth", None if share is None else 100 * _number(share), "%", "of the peak, weights and cache")


def _number(value: object) -> float:
    assert isinstance(value, int | float)
    return float(value)


def _times(factor: float | None, value: float) -> float | None:
    return None if factor is None else factor * value


def _share(recorder: Recorder, name: str, value: float, scale: float, unit: str, peak: float | None) -> None:
    note = "" if peak is None else f"{value / peak:.0%} of the peak {peak / scale:,.0f}"
    recorder.figure(name, value / scale, unit, note)
