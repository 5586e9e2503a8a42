"""The configuration of a run: one dataclass a section, with the names of TRL, PEFT and transformers.

Field docstrings are the command line's help texts.
"""

from dataclasses import dataclass, field
from typing import Literal

from phi3_jax.config import LoraConfig


@dataclass(frozen=True)
class ModelSection:
    """The base model.

    Args:
        name_or_path: Checkpoint folder or hub id.
        dtype: Type of the base's weights in memory.
        attention: Attention kernel; auto chooses by device.
        quantization: None (the only value so far).
        revision: Branch, tag or commit on the hub.
        cache_dir: Where hub downloads are kept (default: huggingface_hub's).
        local_files_only: Never ask the network.
    """

    name_or_path: str
    dtype: Literal["bfloat16", "float32", "float16"] = "bfloat16"
    attention: Literal["auto", "xla"] = "auto"
    quantization: None = None
    revision: str | None = None
    cache_dir: str | None = None
    local_files_only: bool = False


@dataclass(frozen=True)
class PeftSection(LoraConfig):
    """The adapter: PEFT's LoraConfig names.

    Args:
        init_from: Adapter folder to start from instead of fresh weights.
        full_finetuning: Train every weight of the model and no adapter.
    """

    init_from: str | None = None
    full_finetuning: bool = False


@dataclass(frozen=True)
class DataSection:
    """Training and evaluation rows.

    Args:
        train: File (JSON, JSONL, Parquet, CSV), folder of files, save_to_disk folder, or hub dataset id.
        eval: The same for evaluation; or use eval_fraction.
        eval_fraction: Share of the training rows held out, drawn by training.seed, when eval is not given.
        split: Split of a hub dataset to train on.
        eval_split: Split of a hub dataset to evaluate on.
        format: Shape of the rows; auto looks at the columns.
        columns: Which column plays which part, for example {prompt: question, completion: answer}.
        max_length: Positions in a row; longer conversations are cut (and counted).
        packing: Several conversations in a row, each seeing itself alone.
        shuffle: New order every epoch.
        loss_on: Tokens that are trained on; the assistant's turns, the last one alone, or all.
        skip_empty: Leave out, and count, rows with nothing to train on, instead of stopping at the first.
        max_rows: Use only the first so many rows of each.
    """

    train: str | None = None
    eval: str | None = None
    eval_fraction: float = 0.0
    split: str = "train"
    eval_split: str | None = None
    format: Literal["auto", "messages", "sharegpt", "alpaca", "prompt_completion", "text"] = "auto"
    columns: dict[str, str] | None = None
    max_length: int = 2048
    packing: bool = True
    shuffle: bool = True
    loss_on: Literal["assistant", "all", "last"] = "assistant"
    skip_empty: bool = False
    max_rows: int | None = None


@dataclass(frozen=True)
class TrainingSection:
    """How to train: the names of transformers' TrainingArguments, defaults for LoRA."""

    output_dir: str = "out"
    learning_rate: float = 1e-4
    lr_scheduler_type: Literal["constant", "constant_with_warmup", "linear", "cosine"] = "cosine"
    warmup_ratio: float = 0.03
    warmup_steps: int = 0
    num_train_epochs: float = 1.0
    max_steps: int = -1
    per_device_train_batch_size: int = 4
    per_device_eval_batch_size: int = 4
    gradient_accumulation_steps: int = 1
    optim: Literal["adamw", "adafactor", "lion", "sgd"] = "adamw"
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_epsilon: float = 1e-8
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    label_smoothing_factor: float = 0.0
    neftune_noise_alpha: float | None = None
    gradient_checkpointing: bool = True
    logging_steps: int = 10
    eval_strategy: Literal["no", "steps", "epoch"] = "steps"
    eval_steps: int | None = None
    save_strategy: Literal["no", "steps", "epoch"] = "steps"
    save_steps: int = 100
    save_total_limit: int | None = 3
    load_best_model_at_end: bool = False
    early_stopping_patience: int | None = None
    seed: int = 0
    resume_from_checkpoint: bool = False
    eval_generations: int = 4
    eval_max_new_tokens: int = 64


@dataclass(frozen=True)
class ParallelSection:
    """Devices along each axis of the mesh (1 so far)."""

    data: int = 1
    fsdp: int = 1
    tensor: int = 1
    context: int = 1


@dataclass(frozen=True)
class LoggingSection:
    """What is written beside metrics.jsonl.

    Args:
        tensorboard: Write TensorBoard event files under output_dir/tensorboard.
        wandb: Log to Weights & Biases (needs the wandb package).
        wandb_project: Its project.
        run_name: Its run name.
        progress: Show a progress bar on the console.
    """

    tensorboard: bool = True
    wandb: bool = False
    wandb_project: str = "phi3_jax"
    run_name: str | None = None
    progress: bool = True


@dataclass(frozen=True)
class RunConfig:
    """A whole run: `phi3-jax train --config FILE --section.key value`."""

    model: ModelSection
    peft: PeftSection = field(default_factory=PeftSection)
    data: DataSection = field(default_factory=DataSection)
    training: TrainingSection = field(default_factory=TrainingSection)
    parallel: ParallelSection = field(default_factory=ParallelSection)
    logging: LoggingSection = field(default_factory=LoggingSection)
