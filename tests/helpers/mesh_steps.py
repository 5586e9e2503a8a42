"""Steps of one tiny model on meshes of simulated devices, as a process of its own."""

import json
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from phi3_jax.config.training import TrainingSection
from phi3_jax.lora.mask import partition, trainable_mask
from phi3_jax.optim.optimizer import make_optimizer
from phi3_jax.optim.schedule import make_schedule
from phi3_jax.parallel.devices import Devices
from phi3_jax.parallel.mesh import make_mesh
from phi3_jax.performance.collectives import KINDS
from phi3_jax.performance.hlo import Program
from phi3_jax.training.step import TrainState, TrainStep, make_train_step
from tests.helpers.models import random_lora, tiny_model

ROWS, LENGTH, ACCUMULATION, LAYERS = 8, 32, 2, 3
AXES = ("data", "fsdp", "tensor", "context")


def packed_rows() -> dict[str, np.ndarray]:
    """`[accumulation, rows, length]`: three documents a row, of lengths that differ, then padding."""
    rng = np.random.default_rng(0)
    shape = (ACCUMULATION, ROWS, LENGTH)
    ids, positions, segments = (np.zeros(shape, np.int32) for _ in range(3))
    for row in np.ndindex(*shape[:2]):
        ends = np.sort(rng.choice(np.arange(4, LENGTH + 1), 3, replace=False))
        for segment, (start, end) in enumerate(zip((0, *ends[:-1]), ends, strict=True), start=1):
            ids[*row, start:end] = rng.integers(1, 50, end - start)
            positions[*row, start:end] = np.arange(end - start)
            segments[*row, start:end] = segment
    loss_mask = (segments != 0) & (rng.random(shape) < 0.7)
    return {"input_ids": ids, "positions": positions, "segment_ids": segments, "loss_mask": loss_mask.astype(np.int32)}


def step_on(mesh: list[int], **lora: Any) -> tuple[dict[str, Any], list[np.ndarray]]:
    """What one step on this mesh says of its batch and sends, and what the parameters are after it."""
    heads = {"num_attention_heads": 8, "num_key_value_heads": 8, "intermediate_size": 64, "vocab_size": 56}
    training = TrainingSection(
        learning_rate=1.0, optim="sgd", max_grad_norm=0.0, lr_scheduler_type="constant", warmup_ratio=0.0
    )
    devices = Devices(make_mesh(dict(zip(AXES, mesh, strict=True))))
    with devices.in_use():
        model = tiny_model(LAYERS, sliding_window=20, **heads)
        graph, weights = nnx.split(model)
        adapter = random_lora(model, **lora)
        params = devices.spread(jax.tree.map(jnp.copy, {"model": weights, "lora": adapter}))
        trainable, frozen = partition(params, trainable_mask(weights, adapter))
        tx = make_optimizer(training, make_schedule(training, 10))
        state = TrainState.create(trainable, tx, jax.random.key(0))
        batch = devices.put(packed_rows(), ROWS)
        step = TrainStep(make_train_step(graph, model.dtype, tx, training))
        program = Program.of(step.compile(state, frozen, batch).as_text())
        state = step(state, frozen, batch)
    found = {"loss": float(state.window.loss), "grad_norm": float(state.window.grad_norm), **_sent(program)}
    return found, [np.asarray(x) for x in jax.tree.leaves(state.trainable)]


def _sent(program: Program) -> dict[str, int]:
    """How often a step sends something for an adapter while it goes back through the layers, and how many stacked
    arrays it sums between devices."""
    counts = {"in_layers": 0, "arrays_summed": 0}
    for _, instruction, times in program.runs():
        kind = instruction.opcode.removesuffix("-start")
        if kind not in KINDS:
            continue
        if "transpose(jvp" in instruction.op_name and "/lora/" in instruction.op_name:
            counts["in_layers"] += times
        elif kind in ("all-reduce", "reduce-scatter"):
            counts["arrays_summed"] += times * sum(a.shape[:1] == (LAYERS,) for a in instruction.arrays)
    return counts


def main(meshes: list[list[int]], kinds: dict[str, dict[str, Any]]) -> None:
    """Prints for every kind of adapter and every mesh, the first one held to be right, how far it is from that."""
    for name, lora in kinds.items():
        expected, right = step_on(meshes[0], **lora)
        for mesh in meshes[1:]:
            found, params = step_on(mesh, **lora)
            furthest = max(float(np.abs(a - b).max() / np.abs(b).max()) for a, b in zip(params, right, strict=True))
            off = {key: abs(found[key] / expected[key] - 1) for key in ("loss", "grad_norm")}
            print(json.dumps({"kind": name, "mesh": mesh, "parameters": furthest, **found, **off}), flush=True)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]), json.loads(sys.argv[2]))
