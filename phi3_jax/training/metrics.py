"""Where a run's figures go: metrics.jsonl, TensorBoard, Weights & Biases; and model FLOP utilisation."""

import json
import os
import time
from pathlib import Path
from typing import Any, TextIO

import jax
import numpy as np

from phi3_jax.config import Phi3Config
from phi3_jax.run_config import RunConfig

# Dense bfloat16 peaks, FLOP/s a device, from the makers' data sheets; by a part of jax's device_kind.
PEAK_FLOPS = {
    "H200": 989e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "TPU v6 lite": 918e12,
    "TPU v5 lite": 197e12,
    "TPU v5": 459e12,  # v5p
    "TPU v4": 275e12,
}


def peak_flops(device_kind: str) -> float | None:
    """A device's peak, None where it is not known."""
    return next((peak for name, peak in PEAK_FLOPS.items() if name in device_kind), None)


def device_peak() -> float | None:
    """The first device's peak, None where it is not known."""
    return peak_flops(jax.devices()[0].device_kind)


def matmul_parameters(config: Phi3Config) -> int:
    """Weights that every token is multiplied with: all linear layers and the head, no embedding look-up."""
    width = config.num_attention_heads * config.head_dim
    attention = config.hidden_size * (sum(config.qkv_sizes) + width)
    mlp = 3 * config.hidden_size * config.intermediate_size
    return config.num_hidden_layers * (attention + mlp) + config.vocab_size * config.hidden_size


def step_flops(config: Phi3Config, trainable: int, full: bool, tokens: int, attended: float) -> float:
    """FLOP that the mathematics of training on so many tokens takes, recomputation left out.

    Two for each weight and token in the forward pass and two in the backward pass for the
    activations' gradient, two more where the weight trains; attention takes 12 · layers · width for
    each pair of a token and a key that it sees (`attended` of them).
    """
    base = matmul_parameters(config) * (6 if full else 4)
    adapter = 0 if full else 6 * trainable
    width = config.num_attention_heads * config.head_dim
    return (base + adapter) * tokens + 12.0 * config.num_hidden_layers * width * attended


class Stopwatch:
    """Counts seconds while it runs."""

    def __init__(self) -> None:
        self._since: float | None = None

    def start(self) -> None:
        self._since = time.perf_counter()

    def stop(self) -> float:
        """The seconds since the start, 0 where it does not run."""
        since, self._since = self._since, None
        return 0.0 if since is None else time.perf_counter() - since


class MetricsLog:
    """Appends rows to metrics.jsonl, and to TensorBoard and Weights & Biases where asked for."""

    def __init__(self, folder: Path, run: RunConfig, *, keep_rows: int, writes: bool = True):
        self.path = folder / "metrics.jsonl"
        self.history: list[dict[str, Any]] = []
        self._file: TextIO | None = None
        self._tensorboard: Any = None
        self._wandb: Any = None
        if writes:
            self._open(folder, run, keep_rows)

    def _open(self, folder: Path, run: RunConfig, keep_rows: int) -> None:
        self.history = _first_rows(self.path, keep_rows)
        self._file = self.path.open("a", encoding="utf-8")
        step = self.history[-1]["step"] if self.history else 0
        if run.logging.tensorboard:
            import tensorboardX  # brings PyTorch along where that is installed: seconds

            purge_step = step + 1 if step else None
            self._tensorboard = tensorboardX.SummaryWriter(str(folder / "tensorboard"), purge_step=purge_step)
        if run.logging.wandb:
            import wandb

            self._wandb = wandb.init(
                project=run.logging.wandb_project, name=run.logging.run_name, config=run.to_dict(), dir=str(folder)
            )

    def write(self, row: dict[str, Any]) -> None:
        """One line; `row` has its `step`. Nothing where another host writes."""
        self.history.append(row)
        if self._file is None:
            return
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        step, values = row["step"], {name: value for name, value in row.items() if name != "step"}
        for name, value in values.items():
            if self._tensorboard is not None and np.isscalar(value):
                place = f"eval/{name.removeprefix('eval_')}" if name.startswith("eval_") else f"train/{name}"
                self._tensorboard.add_scalar(place, value, step)
        if self._wandb is not None:
            self._wandb.log(values, step=step)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish()


def _first_rows(path: Path, number: int) -> list[dict[str, Any]]:
    """Cuts the file to its first lines: those after the checkpoint are written again."""
    lines = path.read_text(encoding="utf-8").splitlines()[:number] if path.exists() else []
    beside = path.with_name(path.name + ".tmp")
    beside.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    os.replace(beside, path)
    return [json.loads(line) for line in lines]
