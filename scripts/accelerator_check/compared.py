"""The model's logits, its adapter's gradients and ten steps: here, and by the CPU, on the same weights.

The weights are drawn by NumPy, since a device's own random normals differ in their last bits, and rounded to
bfloat16, so that one reference in float32 is the truth for both types. What bfloat16 may be off by is told by the
CPU's own bfloat16: twice that.
"""

from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import PyTree

import phi3_jax as p3
from accelerator_check.record import Recorder
from accelerator_check.sizes import Sizes
from phi3_jax.config.model import Phi3Config
from phi3_jax.config.run import RunConfig
from phi3_jax.lora import Lora
from phi3_jax.model.leaves import abstract_model
from phi3_jax.objectives.next_token import loss
from phi3_jax.optim.optimizer import make_optimizer
from phi3_jax.optim.schedule import make_schedule
from phi3_jax.performance.train import random_batch
from phi3_jax.training.job import job_devices, make_job
from phi3_jax.training.step import TrainStep, make_train_step

Outcome = dict[str, np.ndarray]
DTYPES = ("float32", "bfloat16")
STEPS = 10
# Of float32, between two machines that both compute in it; losses after some steps among them.
LIMITS = {"logits": 1e-4, "gradients": 1e-3, "losses": 1e-4}
# What bfloat16 may be off by at least, where the CPU's is nearly right by chance.
LEAST = {"logits": 5e-3, "gradients": 1e-2, "losses": 1e-3}
KINDS = ("dense", "nf4")


def outcome(sizes: Sizes, dtype: str, kind: str = "dense") -> Outcome:
    """Logits, gradients of the adapter and losses of `STEPS` steps; of quantised weights the logits alone."""
    config = sizes.compared
    run = _settings(sizes, dtype)
    batch = random_batch(np.random.default_rng(1), run, config, rows=1, documents=3)
    micro = {name: jnp.asarray(values[0]) for name, values in batch.items()}
    model, lora = drawn(config, run)
    if kind != "dense":
        model = p3.quantize_model(model, kind)
    kept = np.arange(0, sizes.compared_tokens, max(1, sizes.compared_tokens // 64))
    found = {"logits": _logits(model, lora, micro, kept)}
    if kind == "dense":
        grads = jax.jit(jax.grad(lambda lora: loss(model, lora, micro)))(lora)
        found["gradients"] = jnp.concatenate([jnp.ravel(leaf) for leaf in jax.tree.leaves(grads)])
        found["losses"] = jnp.asarray(_losses(run, model, lora, batch))
    return {name: np.asarray(value, np.float32) for name, value in found.items()}


def _logits(model: p3.Phi3ForCausalLM, lora: Lora, micro: dict[str, jax.Array], kept: np.ndarray) -> jax.Array:
    return model(
        micro["input_ids"],
        positions=micro["positions"],
        segment_ids=micro["segment_ids"],
        lora=lora,
        logits_to_keep=kept,
    )


def _settings(sizes: Sizes, dtype: str) -> RunConfig:
    return RunConfig.from_dict(
        {
            "model": {"name_or_path": "random", "dtype": dtype},
            "peft": {"r": 8, "lora_alpha": 16, "lora_dropout": 0.0, "target_modules": "all-linear"},
            "data": {"max_length": sizes.compared_tokens},
            "training": {
                "per_device_train_batch_size": 1,
                "learning_rate": 1e-3,
                "warmup_ratio": 0.0,
                "max_steps": STEPS,
            },
        }
    )


def drawn(config: Phi3Config, run: RunConfig) -> tuple[p3.Phi3ForCausalLM, Lora]:
    """A model and its adapter with NumPy's numbers, the base's rounded to bfloat16."""
    rng = np.random.default_rng(0)
    graph, shapes = nnx.split(abstract_model(config, run.model.dtype, "auto"))

    def weight(path: tuple[object, ...], leaf: jax.ShapeDtypeStruct) -> jax.Array:
        values = rng.standard_normal(leaf.shape, np.float32)
        values = 1 + 0.1 * values if "norm" in jax.tree_util.keystr(path) else config.initializer_range * values
        return jnp.asarray(values, jnp.bfloat16).astype(leaf.dtype)

    def adapter(leaf: jax.Array) -> jax.Array:
        values = rng.standard_normal(leaf.shape, np.float32) / np.sqrt(np.float32(leaf.shape[-1]))
        return jnp.asarray(0.1 * values, leaf.dtype)

    model: p3.Phi3ForCausalLM = nnx.merge(graph, jax.tree_util.tree_map_with_path(weight, shapes))
    lora: Lora = jax.tree.map(adapter, p3.init_lora(model, run.peft, jax.random.key(0)))
    return model, lora


def _losses(run: RunConfig, model: p3.Phi3ForCausalLM, lora: Lora, batch: PyTree) -> list[float]:
    """Of every step on the same rows, by the very step that a run takes."""
    devices = job_devices(run, model.config)
    job = make_job(run, model, jax.tree.map(jnp.copy, lora), devices, jax.random.key(0))
    tx = make_optimizer(run.training, make_schedule(run.training, STEPS), job.frozen["lora"])
    losses: list[float] = []
    with devices.in_use():
        state = job.first_state(tx)
        step = TrainStep(make_train_step(job.graph, job.dtype, tx, run.training))
        placed = devices.put(batch, devices.batch_size(1))
        for _ in range(STEPS):
            empty = replace(state, window=jax.tree.map(jnp.zeros_like, state.window))
            state = step(empty, job.frozen, placed)
            losses.append(float(state.window.loss) / float(state.window.target_tokens))
    return losses


def write_reference(sizes: Sizes, folder: Path, recorder: Recorder) -> None:
    """What the CPU comes to, for `check_model`; to be run where JAX has the CPU alone."""
    if jax.default_backend() != "cpu":
        raise RuntimeError(f"the reference is the CPU's, and JAX's default here is {jax.default_backend()}")
    for kind in KINDS:
        for dtype in DTYPES:
            with _file(folder, kind, dtype).open("wb") as file:
                np.savez(file, allow_pickle=False, **outcome(sizes, dtype, kind))
    exact = _read(folder, "dense", "float32")
    for name, value in _read(folder, "dense", "bfloat16").items():
        recorder.figure(f"the CPU's own bfloat16, {name}", error(value, exact[name]), "", "off float32")


def check_model(sizes: Sizes, folder: Path, recorder: Recorder) -> None:
    """Compares what this device comes to with the reference."""
    for kind in KINDS:
        exact, rounded = (_read(folder, kind, dtype) for dtype in DTYPES)
        for dtype in DTYPES:
            for name, value in outcome(sizes, dtype, kind).items():
                limit = LIMITS[name]
                if dtype == "bfloat16":
                    limit = max(LEAST[name], 2 * error(rounded[name], exact[name]))
                recorder.error(f"{kind}, {dtype}: {name}", error(value, exact[name]), limit)


def error(a: np.ndarray, b: np.ndarray) -> float:
    """‖a - b‖ / ‖b‖ in float64."""
    x, y = a.astype(np.float64), b.astype(np.float64)
    return float(np.linalg.norm(x - y) / np.linalg.norm(y))


def _file(folder: Path, kind: str, dtype: str) -> Path:
    return folder / f"reference-{kind}-{dtype}.npz"


def _read(folder: Path, kind: str, dtype: str) -> Outcome:
    path = _file(folder, kind, dtype)
    if not path.is_file():
        raise RuntimeError(f"there is no {path.name}: the stage reference did not come so far")
    with np.load(path) as file:
        return dict(file)
