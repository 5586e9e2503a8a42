"""Short runs of training: their files, their settings, and runs that are cut off."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from phi3_jax import Phi3ForCausalLM
from phi3_jax.config.run import RunConfig
from phi3_jax.config.training import TrainingSection
from phi3_jax.lora import Lora, partition, trainable_mask
from phi3_jax.optim.optimizer import make_optimizer
from phi3_jax.optim.schedule import make_schedule
from phi3_jax.training import loop
from phi3_jax.training.loop import train
from phi3_jax.training.step import Params, TrainState, TrainStep, make_train_step
from tests.helpers.checkpoints import write_checkpoint
from tests.helpers.rows import write_chats


def start(
    model: Phi3ForCausalLM, lora: Lora | None, training: TrainingSection, total_steps: int = 10, dtype: Any = None
) -> tuple[TrainState, Params, TrainStep]:
    """A training state, the frozen parameters and the step, for an adapter or, without, the model."""
    graph, weights = nnx.split(model)
    mask = trainable_mask(weights, lora, full_finetuning=lora is None)
    # Copies, since the step takes the trainable arrays with it.
    params = jax.tree.map(jnp.copy, {"model": weights, "lora": lora})
    trainable, frozen = partition(params, mask)
    tx = make_optimizer(training, make_schedule(training, total_steps))
    state = TrainState.create(trainable, tx, jax.random.key(training.seed))
    return state, frozen, TrainStep(make_train_step(graph, dtype or model.dtype, tx, training))


def run_config(folder: Path, output: str = "out", **sections: dict[str, Any]) -> RunConfig:
    """A short run on `folder/base` and `folder/chats.jsonl`; each section may be overridden by name."""
    training = {
        "output_dir": str(folder / output),
        "learning_rate": 1e-2,
        "max_steps": 6,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "logging_steps": 2,
        "eval_steps": 3,
        "save_steps": 2,
        "eval_generations": 2,
        "eval_max_new_tokens": 4,
        "gradient_checkpointing": False,
    }
    return RunConfig.from_dict(
        {
            "model": {"name_or_path": str(folder / "base"), "dtype": "float32", **sections.get("model", {})},
            "peft": {"r": 2, "lora_dropout": 0.1, **sections.get("peft", {})},
            "data": {
                "train": str(folder / "chats.jsonl"),
                "eval": str(folder / "eval.jsonl"),
                "max_length": 32,
                **sections.get("data", {}),
            },
            "training": {**training, **sections.get("training", {})},
            "logging": {"progress": False, "tensorboard": False, **sections.get("logging", {})},
        }
    )


def write_inputs(folder: Path) -> Path:
    """What `run_config` reads."""
    write_checkpoint(folder / "base")
    write_chats(folder / "chats.jsonl")
    write_chats(folder / "eval.jsonl", number=5, seed=1)
    return folder


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def weights(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.glob("*.safetensors")}


class Killed(Exception):
    pass


def cut_off(run: RunConfig, after: int, monkeypatch, **given: Any) -> None:
    """Runs until so many steps were taken, and no further; on rows that are `given` in memory, or its own."""
    take = loop.Trainer._take_step

    def take_or_die(self):
        if self.progress.step == after:
            raise Killed
        take(self)

    with monkeypatch.context() as patch:
        patch.setattr(loop.Trainer, "_take_step", take_or_die)
        with pytest.raises(Killed):
            train(run, **given)


def same_run(one: Path, other: Path) -> None:
    """Same adapter, same lines of metrics but for the clock's, same results but for the clock's."""
    name = "adapter/adapter_model.safetensors"
    assert (one / name).read_bytes() == (other / name).read_bytes()
    clock = ("tokens_per_second", "mfu")
    without_clock = [
        [{key: value for key, value in row.items() if key not in clock} for row in metrics(folder)]
        for folder in (one, other)
    ]
    assert without_clock[0] == without_clock[1]
    results = [json.loads((folder / "all_results.json").read_text()) for folder in (one, other)]
    clock = ("train_runtime", "train_steps_per_second", "train_tokens_per_second")
    assert [{k: v for k, v in r.items() if k not in clock} for r in results[:1]] == [
        {k: v for k, v in r.items() if k not in clock} for r in results[1:]
    ]


# Lines every 3 steps and checkpoints every 2, so that a checkpoint falls between two lines; an
# epoch of 2 steps; dropout, so that the random state matters.
SETTINGS = {"logging_steps": 3, "save_steps": 2, "eval_steps": 4, "max_steps": 7, "load_best_model_at_end": True}
