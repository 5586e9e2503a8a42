"""A first run for a model, a file of rows and a device: the settings that fit, and why each."""

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np

from phi3_jax.config.run import RunConfig
from phi3_jax.config.sections import DataSection
from phi3_jax.data.look import RowsLook
from phi3_jax.hf.checkpoint import Checkpoint
from phi3_jax.model.leaves import model_leaves
from phi3_jax.parallel.hardware import GB, hardware
from phi3_jax.performance.choose import with_chosen_axes
from phi3_jax.performance.memory import ESTIMATE_MARGIN, Estimator
from phi3_jax.performance.plan import Plan, as_stored, make_plan
from phi3_jax.performance.topology import JAX_GPU_SHARE, Topology, parse_topology
from phi3_jax.system.errors import InputError

Method = Literal["auto", "lora", "qlora", "full"]
METHODS: tuple[Method, ...] = ("auto", "lora", "qlora", "full")

# Below so many parameters a model is one to see the way with: it learns fast, and needs no memory saved.
_SMALL = 100_000_000
# Steps of a pass over the rows that there should be at least.
_STEPS = 30
_LONGEST = 4096  # positions that are proposed at most
# Of a device's memory: what JAX lets arrays take, and what it can be told to; of a CPU what others leave.
_SHARES = {"gpu": (JAX_GPU_SHARE, 0.95), "tpu": (1.0,), "cpu": (0.6,)}

Settings = dict[str, object]  # by section.key


@dataclass(frozen=True)
class Proposal:
    """A run that fits, and what to say of it.

    Attributes:
        settings: By `section.key`, in the order of a file.
        why: Lines about a setting, by its key.
        plan: Of the run.
        steps: How many optimizer steps it has.
        needs_share: Whether JAX must be told to take more of the GPU's memory than it does.
    """

    settings: Settings
    why: dict[str, str]
    plan: Plan
    steps: int
    needs_share: bool


def propose(
    checkpoint: Checkpoint, rows: RowsLook, topology_name: str, *, data: DataSection, method: Method, output_dir: str
) -> Proposal:
    """Settings of a run on these rows that fit on the device.

    Args:
        checkpoint: The base.
        rows: What was seen of `data`.
        topology_name: The device, as `parse_topology` takes it.
        data: Where the rows are, and how they are read.
        method: How to train; auto takes LoRA where that fits, and QLoRA where it does not.
        output_dir: Of the run.

    Raises:
        InputError: Where nothing fits.
    """
    topology = parse_topology(topology_name)
    wanted = _Wanted(checkpoint, rows, topology)
    estimator = Estimator(checkpoint.config)
    methods: tuple[Method, ...] = ("lora", "qlora") if method == "auto" and not checkpoint.quantization else (method,)
    for share in _SHARES[topology.platform]:
        for way in methods:
            for settings in wanted.candidates(way, data=data, output_dir=output_dir):
                run = _run(settings)
                placed, _ = with_chosen_axes(as_stored(run, checkpoint), topology, estimator)
                total = estimator(placed, topology).total
                # Rows that devices have to share would make another batch than the one that is told of.
                if placed.parallel.context == 1 and total * (1 + ESTIMATE_MARGIN) <= share * topology.hbm:
                    plan = make_plan(run, topology_name, estimate=True)
                    is_more = topology.platform == "gpu" and share > JAX_GPU_SHARE
                    return Proposal(settings, wanted.why(settings, method), plan, wanted.steps(settings), is_more)
    raise InputError(
        f"{checkpoint.name} does not fit on {topology_name}, {topology.hbm / GB:.0f} GB each, with rows of "
        f"{wanted.length:,} tokens, one at a time{' in NF4' if 'qlora' in methods else ''}; give a larger device, a "
        f"smaller model{', or --method qlora' if 'qlora' not in methods else ''}"
    )


def method_of(name: str) -> Method:
    """The method of that name.

    Raises:
        InputError: There is none.

    Example:
        >>> method_of("qlora")
        'qlora'
    """
    found = next((method for method in METHODS if method == name.lower()), None)
    if found is None:
        raise InputError(f"method {name!r} is not known; give one of {', '.join(METHODS)}")
    return found


def _run(settings: Settings) -> RunConfig:
    sections: dict[str, dict[str, object]] = {}
    for name, value in settings.items():
        section, _, key = name.partition(".")
        sections.setdefault(section, {})[key] = value
    return RunConfig.from_dict(sections)


class _Wanted:
    """What the rows and the model ask for, whatever the memory."""

    def __init__(self, checkpoint: Checkpoint, rows: RowsLook, topology: Topology) -> None:
        self.checkpoint, self.rows, self.topology = checkpoint, rows, topology
        self.is_small = sum(math.prod(leaf.shape) for leaf in model_leaves(checkpoint.shapes).values()) < _SMALL
        self.devices = topology.devices if topology.platform != "cpu" else 1
        positions = min(checkpoint.config.max_position_embeddings, _LONGEST)
        needed = 64 * math.ceil(int(rows.lengths.max()) / 64)
        # Enough short rows to fill sequences with: many in each.
        self.packs = rows.tokens / 2048 / 16 > 2 * _STEPS and needed <= 2048 <= positions
        self.length = min(positions, 2048 if self.packs else max(needed, 128))
        self.held_out = min(0.1, round(500 / rows.rows, 4)) if rows.rows >= 20 else 0.0
        sequences = rows.tokens / self.length if self.packs else rows.rows
        self.sequences = max(1, int(sequences * (1 - self.held_out)))
        self.epochs = 5 if self.is_small else 3 if rows.rows < 5000 else 1
        batch = next(size for size in (16, 8, 4, 2, 1) if self.sequences // size >= _STEPS or size == 1)
        # Every device has a row.
        self.batch = self.devices * math.ceil(batch / self.devices)

    @property
    def dtype(self) -> str:
        if self.topology.platform == "cpu":
            return "float32"
        peaks = hardware(self.topology.device_kind)
        return "float16" if peaks is not None and peaks.float32 is not None else "bfloat16"

    def steps(self, settings: Settings) -> int:
        """Of the whole run, about."""
        return self.epochs * max(1, math.ceil(self.sequences / self.batch))

    def candidates(self, way: Method, *, data: DataSection, output_dir: str) -> list[Settings]:
        """The settings with as many rows at a time as a step has, and with ever fewer."""
        each = self.batch // self.devices
        sizes = [size for size in range(min(each, 8), 0, -1) if each % size == 0]
        return [self._settings(way, size, each // size, data, output_dir) for size in sizes]

    def _settings(self, way: Method, size: int, times: int, data: DataSection, output_dir: str) -> Settings:
        rates = {"full": 1e-5} if not self.is_small else {"full": 1e-3, "lora": 3e-3, "qlora": 3e-3, "auto": 3e-3}
        found: Settings = {"model.name_or_path": self.checkpoint.name, "model.dtype": self.dtype}
        if self.checkpoint.revision:
            found["model.revision"] = self.checkpoint.revision
        if way == "qlora":
            found |= {"model.quantization": "nf4"}
        if way == "full":
            found["peft.full_finetuning"] = True
        else:
            adapter = {"r": 16, "lora_alpha": 32, "lora_dropout": 0.0 if self.is_small else 0.05}
            found |= {f"peft.{key}": value for key, value in adapter.items()} | {"peft.target_modules": "all-linear"}
        found["data.train"] = data.train
        if data.columns:
            found["data.columns"] = data.columns
        if data.skip_invalid:
            found["data.skip_invalid"] = True
        if self.held_out:
            found["data.eval_fraction"] = self.held_out
        found |= {"data.max_length": self.length, "data.packing": self.packs, "data.loss_on": "assistant"}
        found |= {
            "training.output_dir": output_dir,
            "training.learning_rate": rates.get(way, 2e-4),
            "training.lr_scheduler_type": "cosine",
            "training.warmup_ratio": 0.1,
            "training.num_train_epochs": self.epochs,
            "training.per_device_train_batch_size": size,
            "training.per_device_eval_batch_size": size,
            "training.gradient_accumulation_steps": times,
            "training.gradient_checkpointing": not self.is_small,
        }
        if way == "full" and not self.is_small:
            found["training.optim"] = "adamw_8bit"
        found |= self._measured()
        if self.devices > 1:
            found["parallel.axes"] = "auto"
        return found

    def _measured(self) -> Settings:
        """When the run is logged, evaluated and saved."""
        found: Settings = {"training.logging_steps": max(1, self.steps({}) // 40)}
        when: Settings = {"strategy": "epoch"}
        if self.epochs == 1:
            when = {"strategy": "steps", "steps": max(1, self.steps({}) // 5)}
        if self.held_out:
            found |= {f"training.eval_{key}": value for key, value in when.items()}
        found |= {f"training.save_{key}": value for key, value in when.items()} | {"training.save_total_limit": 2}
        if self.held_out:
            answer = 64 * math.ceil(float(np.quantile(self.rows.targets, 0.95)) / 64)
            found["training.load_best_model_at_end"] = True
            found["training.eval_generations"] = min(20, math.ceil(self.held_out * self.rows.rows))
            found["training.eval_max_new_tokens"] = min(
                256, answer, self.checkpoint.config.max_position_embeddings // 2
            )
        return found

    def why(self, settings: Settings, method: Method) -> dict[str, str]:
        """What to say of settings."""
        longer = int((self.rows.lengths > self.length).sum())
        share = (
            f"{longer / len(self.rows.lengths):.0%} of the rows are longer, and cut" if longer else "the longest row"
        )
        size, times = (settings[f"training.{key}"] for key in (_SIZE, _TIMES))
        found = {
            "model.dtype": {
                "float32": "faster than 16 bits on a CPU",
                "float16": "this GPU has no bfloat16; where steps are skipped, take bfloat16, which is slower there",
            }.get(self.dtype, ""),
            "model.quantization": "QLoRA: the base in 4 bits; float weights do not fit"
            if method == "auto"
            else "QLoRA",
            "peft.r": "the adapter's rank: more can learn more, and takes more memory",
            "data.eval_fraction": "rows held out to measure on; data.eval names a file in their place",
            "data.max_length": "several rows share so many positions" if self.packs else f"positions of a row: {share}",
            "data.packing": "" if self.packs else "with so few rows one each, so that there are more steps",
            "data.skip_invalid": f"{len(self.rows.stats.left_out):,} of those that were looked at are left out",
            "data.loss_on": "or all, or last: what is trained on (phi3-jax data shows it)",
            "training.learning_rate": "the setting to try others of first",
            "training.num_train_epochs": f"passes over the rows: {self.steps(settings):,} steps of {self.batch}",
            "training.per_device_train_batch_size": f"rows at a time; x {times} below make a step's {self.batch}"
            if self.devices == 1
            else f"rows at a time on each of {self.devices} devices; {size} x {times} x {self.devices} make a step",
            "training.gradient_checkpointing": "less memory, a third more time" if not self.is_small else "",
            "training.load_best_model_at_end": "the adapter of the lowest evaluation loss is the one that is written",
            "training.eval_generations": "rows answered before and after, for report.html",
            "parallel.axes": "each device has rows of its own, and a copy of the weights or a share, as they fit",
        }
        return {key: text for key, text in found.items() if text and key in settings}


_SIZE, _TIMES = "per_device_train_batch_size", "gradient_accumulation_steps"
