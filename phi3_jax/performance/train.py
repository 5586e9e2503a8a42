"""The train step of a run, measured: random weights and rows, and everything else as the run has it."""

import platform
import statistics
import time
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from phi3_jax.config.model import Phi3Config
from phi3_jax.config.run import RunConfig
from phi3_jax.optim.optimizer import make_optimizer
from phi3_jax.optim.schedule import make_schedule
from phi3_jax.parallel.hardware import hardware
from phi3_jax.performance.weights import random_model
from phi3_jax.system.errors import InputError
from phi3_jax.system.packages import package_versions
from phi3_jax.training.checks import check_length
from phi3_jax.training.flops import step_flops
from phi3_jax.training.job import Job, job_devices, make_job
from phi3_jax.training.results import peak_memory
from phi3_jax.training.start import fresh_lora
from phi3_jax.training.step import TrainState, TrainStep, make_train_step


@dataclass
class Workload:
    """A step that is ready to run, on `job.devices`.

    Attributes:
        job: As of a run, without tokenizer and data.
        state: Which each step takes and gives back.
        train_step: Not compiled yet.
        rows: Of a micro-batch over all devices.
    """

    job: Job
    state: TrainState
    train_step: TrainStep
    rows: int


def prepare(run: RunConfig, config: Phi3Config, *, steps: int) -> Workload:
    """The step as `training.job` and `training.trainer` make it, for a model with random weights.

    Args:
        run: Whose `model.name_or_path` and `data` but for `max_length` are not read.
        config: The model's shape.
        steps: Over which the learning rate has its course.

    Raises:
        InputError: Where devices, model and rows do not go together.
    """
    training, full = run.training, run.peft.full_finetuning
    devices = job_devices(run, config)
    lora_key, step_key = jax.random.split(jax.random.key(training.seed))
    model = random_model(
        config,
        dtype=jnp.float32 if full else run.model.dtype,
        quantization=run.model.quantization,
        double_quant=run.model.double_quant,
        attention=run.model.attention,
        mesh=devices.mesh,
        seed=training.seed,
    )
    lora = None if full else fresh_lora(model, run.peft, lora_key, devices.mesh)
    job = make_job(run, model, lora, devices, step_key)
    tx = make_optimizer(training, make_schedule(training, steps), job.frozen["lora"])
    with devices.in_use():
        first = job.first_state(tx)
    train_step = TrainStep(make_train_step(job.graph, job.dtype, tx, training), training.compiler_options)
    return Workload(job, first, train_step, devices.batch_size(training.per_device_train_batch_size))


def random_batch(
    rng: np.random.Generator, run: RunConfig, config: Phi3Config, *, rows: int, documents: int = 1
) -> dict[str, Int[np.ndarray, "accumulation rows seq"]]:
    """Rows of random tokens without padding, of `documents` equally long documents each, all of them targets."""
    seq = run.data.limit
    shape = (run.training.gradient_accumulation_steps, rows, seq)
    # Document d covers the places from d * seq / documents on.
    segments = 1 + np.arange(seq) * documents // seq
    starts = np.searchsorted(segments, segments)
    row = {"positions": np.arange(seq) - starts, "segment_ids": segments, "loss_mask": np.ones(seq)}
    batch = {name: np.broadcast_to(values, shape).astype(np.int32) for name, values in row.items()}
    return {"input_ids": rng.integers(0, config.vocab_size, shape, np.int32), **batch}


def check_workload(run: RunConfig, config: Phi3Config, *, documents: int) -> None:
    """Raises `InputError` for what can be seen before anything is made."""
    seq = run.data.limit
    check_length(seq, config)
    if documents > seq // 2:
        raise InputError(f"{documents} documents in a row of {seq} tokens have less than 2 each; give fewer")
    if run.peft.init_from is not None:
        raise InputError(
            f"peft.init_from is {run.peft.init_from}, but a benchmark makes its adapter as the other keys of peft "
            "say; set it to null"
        )
    if run.peft.init_lora_weights in ("eva", "loftq"):
        raise InputError(
            f"peft.init_lora_weights is {run.peft.init_lora_weights}, which looks at data or at a checkpoint; its "
            "step is that of true, give that"
        )


def benchmark_train(
    run: RunConfig, config: Phi3Config, *, steps: int, warmup: int, documents: int = 1
) -> dict[str, object]:
    """Times `steps` steps after `warmup` others, each from rows on the host to its end on the device.

    Returns:
        What `phi3-jax benchmark train` prints as JSON: `tokens_per_second`, of all devices, at the median step;
        `step_seconds`, that median; `compile_seconds`, with tracing; `peak_memory_gb` (10⁹ bytes, the fullest device's)
        and `memory_kind`, `device`, or `process` where the backend does not count: the process's peak of resident
        memory, with all that was loaded and compiled; `flops_per_token`, see `training.flops.step_flops`; `mfu`, None
        where the device's peak is not known; `loss`, of all steps taken; `steps`, devices, versions and settings.

    Raises:
        InputError: For settings that do not go together.
        FloatingPointError: Where the loss is not finite.
    """
    check_workload(run, config, documents=documents)
    workload = prepare(run, config, steps=warmup + steps)
    job, state = workload.job, workload.state
    rng = np.random.default_rng(run.training.seed)
    here = job.devices.rows_here(workload.rows)

    def put() -> dict[str, Array]:
        batch = random_batch(rng, run, config, rows=workload.rows, documents=documents)
        if here is not None:
            batch = {name: array[:, list(here)] for name, array in batch.items()}
        return job.devices.put(batch, workload.rows)

    seconds = []
    with job.devices.in_use():
        start = time.perf_counter()
        workload.train_step.compile(state, job.frozen, put())
        compile_seconds = time.perf_counter() - start
        for _ in range(warmup + steps):
            start = time.perf_counter()
            state = jax.block_until_ready(workload.train_step(state, job.frozen, put()))
            seconds.append(time.perf_counter() - start)
    loss = float(state.window.loss) / float(state.window.target_tokens)
    if not np.isfinite(loss):
        advice = "give model.dtype bfloat16" if job.dtype == jnp.float16 else "lower training.learning_rate"
        raise FloatingPointError(f"the loss is {loss} after {len(seconds)} steps; {advice}")
    return {
        **_speed(run, config, workload, documents, statistics.median(seconds[warmup:])),
        "compile_seconds": compile_seconds,
        **_memory(),
        "loss": loss,
        "steps": steps,
        "device_kind": jax.devices()[0].device_kind,
        "devices": workload.job.devices.mesh.size,
        "trainable_parameters": job.table.trainable,
        "versions": {
            "python": platform.python_version(),
            **package_versions("phi3_jax", "jax", "jaxlib", "flax"),
        },
        "settings": _settings(run, workload, documents),
    }


def _speed(run: RunConfig, config: Phi3Config, workload: Workload, documents: int, seconds: float) -> dict[str, object]:
    rows = workload.rows * run.training.gradient_accumulation_steps
    tokens = rows * run.data.limit
    positions = random_batch(np.random.default_rng(0), run, config, rows=1, documents=documents)["positions"][0]
    keys = np.minimum(positions + 1.0, config.sliding_window or np.inf)
    trainable, full = workload.job.table.trainable, run.peft.full_finetuning
    flops = step_flops(config, trainable, full, tokens, rows * float(keys.sum()))
    peaks = hardware()
    return {
        "tokens_per_second": tokens / seconds,
        "step_seconds": seconds,
        "flops_per_token": flops / tokens,
        "mfu": None if peaks is None else flops / seconds / (peaks.flops * workload.job.devices.mesh.size),
    }


def _memory() -> dict[str, object]:
    """The most that a device had in use; where the backend does not count, the process's resident memory."""
    peak = peak_memory()
    if peak["device_peak_bytes"] is not None:
        return {"peak_memory_gb": peak["device_peak_bytes"] / 1e9, "memory_kind": "device"}
    assert peak["host_peak_bytes"] is not None
    return {"peak_memory_gb": peak["host_peak_bytes"] / 1e9, "memory_kind": "process"}


def _settings(run: RunConfig, workload: Workload, documents: int) -> dict[str, object]:
    config, training, mesh = workload.job.config, run.training, workload.job.devices.mesh
    return {
        "hidden": config.hidden_size,
        "layers": config.num_hidden_layers,
        "heads": config.num_attention_heads,
        "kv_heads": config.num_key_value_heads,
        "intermediate": config.intermediate_size,
        "vocab": config.vocab_size,
        "seq": run.data.limit,
        "batch": training.per_device_train_batch_size,
        "accumulation": training.gradient_accumulation_steps,
        "documents": documents,
        "dtype": run.model.dtype,
        "quantization": run.model.quantization,
        "attention": run.model.attention,
        "remat": training.remat,
        "rank": None if run.peft.full_finetuning else run.peft.r,
        "optim": training.optim,
        "parallel": dict(mesh.shape) if mesh.size > 1 else None,
    }
