"""The sections of a run's configuration: a dataclass each, with the names of TRL, PEFT and transformers.

The `Attributes` of the docstrings are the command line's help texts. A section checks its own values when
it is made.
"""

import os
from dataclasses import asdict, dataclass, field
from typing import Literal

from phi3_jax.config.hub_options import Hub
from phi3_jax.config.lora import LoraConfig
from phi3_jax.system.errors import InputError

# What `data.train` and `data.eval` say of rows that a program has given in memory.
TRAIN_IN_MEMORY, EVAL_IN_MEMORY = "train_dataset, in memory", "eval_dataset, in memory"


def _check_range(
    section: str, values: object, names: str, *, low: float, high: float | None = None, below: float | None = None
) -> None:
    for name in names.split():
        value = getattr(values, name)
        if value is None:
            continue
        wanted = f"at least {low}"
        if high is not None:
            wanted = f"from {low} to {high}"
        elif below is not None:
            wanted = f"at least {low} and below {below}"
        # Written so that NaN, which compares false with everything, is refused too, and infinity.
        if not (low <= value < float("inf") and (high is None or value <= high) and (below is None or value < below)):
            raise InputError(f"{section}.{name} is {value}, expected {wanted}")


@dataclass(frozen=True)
class ModelSection:
    """The base model.

    Attributes:
        name_or_path: Checkpoint folder or hub id.
        dtype: Type of the base's weights in memory.
        attention: Attention kernel; auto chooses by device.
        quantization: What the linear layers of the base are kept in: nf4 (QLoRA) or int8, made dense layer by layer
            inside the step; null or none for dtype. Embeddings, norms and the output head stay in dtype.
        double_quant: Quantise the statistics of nf4 too.
        revision: Branch, tag or commit on the hub.
        cache_dir: Where hub downloads are kept (default: huggingface_hub's).
        local_files_only: Never ask the network.
    """

    name_or_path: str
    dtype: Literal["bfloat16", "float32", "float16"] = "bfloat16"
    attention: Literal["auto", "xla", "cudnn", "splash", "chunked"] = "auto"
    quantization: Literal["none", "nf4", "int8"] | None = None
    double_quant: bool = True
    revision: str | None = None
    cache_dir: str | None = None
    local_files_only: bool = False

    def __post_init__(self) -> None:
        if self.quantization == "none":  # another word for null
            object.__setattr__(self, "quantization", None)

    @property
    def hub(self) -> Hub:
        """How the hub is asked for this model."""
        return Hub(self.revision, cache_dir=self.cache_dir, local_files_only=self.local_files_only)


@dataclass(frozen=True)
class PeftSection(LoraConfig):
    """The adapter: the names of PEFT's LoraConfig.

    Attributes:
        init_from: Adapter folder to start from instead of fresh weights.
        full_finetuning: Train every weight of the model and no adapter.
    """

    init_from: str | None = None
    full_finetuning: bool = False


@dataclass(frozen=True)
class DataSection:
    """Training and evaluation rows.

    Attributes:
        train: File (JSON, JSONL, Parquet, Arrow, CSV), folder of files, save_to_disk folder, or hub dataset id.
        eval: The same for evaluation; or use eval_fraction.
        eval_fraction: Share of the training rows held out, drawn by training.seed, when eval is not given.
        split: Split to train on, where the source has several.
        eval_split: Split to evaluate on, of data.eval or, if that is not given, of data.train.
        dataset_config: Configuration (subset) of a hub dataset that has several.
        format: Shape of the rows; auto looks at the columns.
        columns: Which column plays which part, for example {prompt: question, completion: answer}.
        max_length: Positions in a row; longer conversations are cut (and counted).
        packing: Several conversations in a row, each seeing itself alone.
        shuffle: New order every epoch.
        template: How prompt and completion become a row where they are strings. auto renders them as a chat, but for
            those that hold the template's control tokens already; none takes all as they are, with nothing in between
            and the end token behind them, as TRL does.
        loss_on: Tokens that are trained on; the assistant's turns, the last one alone, or all. completion is TRL's way
            where a script says nothing: the completion of rows that are prompt and completion, all of others.
        final_eos: Train also the end token that a template writes behind the last turn, and give it to text without
            one, as TRL does.
        literal_roles: Whose texts hold no control tokens, whatever they look like. Those that open and close turns are
            text in everybody's.
        ignore_keys: Columns, and keys of turns, to pass over that would be an error otherwise.
        skip_empty: Leave out, and count, rows with nothing to train on, instead of stopping at the first.
        skip_invalid: Leave out, count and list rows with any fault, instead of stopping at the first.
        max_rows: Use only the first so many rows of each.
        cache: Keep prepared rows beside the hub's cache, for the next run with the same rows and settings.
        streaming: Read, render and pack training rows while it trains, in constant memory; needs training.max_steps.
        shuffle_buffer_size: Rows that wait to be drawn from, where data.streaming is true.
    """

    train: str | None = None
    eval: str | None = None
    eval_fraction: float = 0.0
    split: str = "train"
    eval_split: str | None = None
    dataset_config: str | None = None
    format: Literal["auto", "messages", "sharegpt", "alpaca", "prompt_completion", "text", "tokens"] = "auto"
    columns: dict[str, str] | None = None
    max_length: int = 2048
    packing: bool = True
    shuffle: bool = True
    template: Literal["auto", "none"] = "auto"
    loss_on: Literal["assistant", "all", "last", "completion"] = "assistant"
    final_eos: bool = False
    literal_roles: list[Literal["system", "user", "assistant", "tool"]] = field(
        default_factory=lambda: ["user", "tool"]
    )
    ignore_keys: list[str] = field(default_factory=list)
    skip_empty: bool = False
    skip_invalid: bool = False
    max_rows: int | None = None
    cache: bool = True
    streaming: bool = False
    shuffle_buffer_size: int = 10_000

    def __post_init__(self) -> None:
        _check_range("data", self, "eval_fraction", low=0, below=1)
        _check_range("data", self, "max_length", low=2)
        _check_range("data", self, "max_rows", low=1)
        _check_range("data", self, "shuffle_buffer_size", low=1)
        if not (self.streaming and self.shuffle) and self.shuffle_buffer_size != type(self).shuffle_buffer_size:
            raise InputError(
                f"data.shuffle_buffer_size is {self.shuffle_buffer_size}, but only rows that are streamed and shuffled "
                "pass through a buffer; set data.streaming true, or leave it out"
            )
        if self.streaming and self.eval_fraction:
            raise InputError(
                f"data.eval_fraction is {self.eval_fraction}, but of rows that are streamed no share can be drawn "
                "beforehand; give data.eval"
            )

    def require_train(self) -> str:
        """`train`. Raises `InputError` where it is not set."""
        if self.train is None:
            raise InputError("data.train is not set; name a file, a folder or a hub dataset id to train on")
        return self.train

    @property
    def has_eval(self) -> bool:
        """Whether there are evaluation rows."""
        return self.eval is not None or self.eval_split is not None or self.eval_fraction > 0


@dataclass(frozen=True)
class TrainingSection:
    """How to train: the names of transformers' TrainingArguments, with defaults for LoRA.

    Attributes:
        output_dir: Folder that the run writes; must not hold another run.
        overwrite_output_dir: Replace the run that output_dir holds, unless it is resumed.
        learning_rate: Peak of the schedule.
        lr_scheduler_type: Course of the learning rate after warm-up.
        warmup_ratio: Share of the steps over which the learning rate rises from 0.
        warmup_steps: The same in steps; where given, it wins over warmup_ratio.
        num_train_epochs: Passes over the training rows.
        max_steps: Optimizer steps; where positive, it wins over num_train_epochs.
        per_device_train_batch_size: Rows in a forward pass.
        per_device_eval_batch_size: Rows in a forward pass of an evaluation.
        gradient_accumulation_steps: Forward passes for an optimizer step.
        optim: Optimizer. adamw_8bit keeps AdamW's state in 2 bytes a parameter, as bitsandbytes does; lorafa trains
            B alone, A staying as it is drawn, with B's gradient corrected for that (LoRA-FA).
        adam_beta1: Decay of AdamW's mean of gradients; for lion too.
        adam_beta2: Decay of AdamW's mean of squared gradients; for lion of its momentum.
        adam_epsilon: Added to AdamW's denominator (PEFT's own LoRA-FA always has 1e-6).
        weight_decay: Decoupled decay of matrices; norms are left alone, but with lorafa and LoRA+, as in PEFT.
        loraplus_lr_ratio: LoRA+, that many times the learning rate for B and for vectors; 16 is a usual value.
        loraplus_lr_embedding: With LoRA+, the peak learning rate of an embedding's adapter.
        max_grad_norm: Gradients are scaled down to this global norm; 0 switches it off.
        max_skipped_steps: Steps in a row whose loss or gradient is not finite, and which change nothing; the run stops
            at the next one. 0 stops at the first.
        debug_nans: Look for such numbers after every step, which takes time, and name the layer that they come from.
        label_smoothing_factor: Share of the target's probability spread over the vocabulary.
        neftune_noise_alpha: Size of NEFTune's noise on the embeddings in training.
        gradient_checkpointing: Compute activations again in the backward pass, to save memory.
        remat_policy: What is kept all the same. full: each layer's input alone; attention: its result too; dots: and
            the products with weights; offload: the input, in the host's memory; none: everything, as without
            gradient_checkpointing.
        logging_steps: Steps between lines of metrics.jsonl.
        eval_strategy: When to evaluate; a run with evaluation rows also evaluates at its end unless no.
        eval_steps: Steps between evaluations; null evaluates at the end alone.
        save_strategy: When to write a checkpoint.
        save_steps: Steps between checkpoints.
        save_total_limit: Checkpoints to keep; null keeps all.
        load_best_model_at_end: The adapter written is that of the lowest evaluation loss, not the last.
        early_stopping_patience: Stop after so many evaluations in a row without a lower loss.
        seed: Of the adapter's start, dropout, the order of rows and the held-out fraction.
        resume_from_checkpoint: Continue the run that output_dir holds, from its last whole checkpoint.
        resume_changed: Continue it even with settings that change its result.
        fallback_dir: Folder for the weights where output_dir takes no more, as on a full disk; null: none.
        eval_generations: Evaluation rows answered before and after training, for the report.
        eval_max_new_tokens: Longest of those answers, in tokens.
    """

    output_dir: str = "out"
    overwrite_output_dir: bool = False
    learning_rate: float = 1e-4
    lr_scheduler_type: Literal["constant", "constant_with_warmup", "linear", "cosine"] = "cosine"
    warmup_ratio: float = 0.03
    warmup_steps: int = 0
    num_train_epochs: float = 1.0
    max_steps: int = -1
    per_device_train_batch_size: int = 4
    per_device_eval_batch_size: int = 4
    gradient_accumulation_steps: int = 1
    optim: Literal["adamw", "adamw_8bit", "adafactor", "lion", "sgd", "lorafa"] = "adamw"
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_epsilon: float = 1e-8
    weight_decay: float = 0.0
    loraplus_lr_ratio: float | None = None
    loraplus_lr_embedding: float = 1e-6
    max_grad_norm: float = 1.0
    max_skipped_steps: int = 5
    debug_nans: bool = False
    label_smoothing_factor: float = 0.0
    neftune_noise_alpha: float | None = None
    gradient_checkpointing: bool = True
    remat_policy: Literal["none", "dots", "attention", "full", "offload"] = "full"
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
    resume_changed: bool = False
    fallback_dir: str | None = None
    eval_generations: int = 4
    eval_max_new_tokens: int = 64

    @property
    def evaluates_midway(self) -> bool:
        """Whether an evaluation is wanted before the end."""
        return self.eval_strategy == "epoch" or (self.eval_strategy == "steps" and self.eval_steps is not None)

    @property
    def remat(self) -> str:
        """The rematerialisation policy in force."""
        return self.remat_policy if self.gradient_checkpointing else "none"

    def __post_init__(self) -> None:
        for name in ("output_dir", "fallback_dir"):  # which a shell does not see in a file
            if (path := getattr(self, name)) is not None:
                object.__setattr__(self, name, os.path.expanduser(path))
        at_least_1 = (
            "per_device_train_batch_size per_device_eval_batch_size gradient_accumulation_steps logging_steps "
            "eval_steps save_steps save_total_limit early_stopping_patience eval_max_new_tokens"
        )
        _check_range("training", self, at_least_1, low=1)
        _check_range("training", self, "warmup_ratio", low=0, high=1)
        _check_range("training", self, "adam_beta1 adam_beta2 label_smoothing_factor", low=0, below=1)
        not_negative = (
            "learning_rate warmup_steps num_train_epochs adam_epsilon weight_decay max_grad_norm loraplus_lr_embedding "
            "neftune_noise_alpha seed eval_generations max_skipped_steps"
        )
        _check_range("training", self, not_negative, low=0)
        if self.max_steps != -1 and self.max_steps < 1:
            raise InputError(f"training.max_steps is {self.max_steps}, expected at least 1, or -1 to train by epochs")
        if self.max_steps == -1 and self.num_train_epochs == 0:
            raise InputError("training.num_train_epochs is 0 and training.max_steps -1: nothing to train; raise one")
        self._check_loraplus()

    def _check_loraplus(self) -> None:
        ratio = self.loraplus_lr_ratio
        if ratio is None:
            if self.loraplus_lr_embedding != type(self).loraplus_lr_embedding:
                raise InputError(
                    f"training.loraplus_lr_embedding is {self.loraplus_lr_embedding}, but without LoRA+ nothing reads "
                    "it; give training.loraplus_lr_ratio too"
                )
            return
        _check_range("training", self, "loraplus_lr_ratio", low=1)
        if self.optim == "lorafa":
            raise InputError(
                f"training.loraplus_lr_ratio is {ratio}, but training.optim lorafa trains no A that B could be "
                "faster than; leave one out"
            )
        if self.learning_rate == 0:
            raise InputError(
                f"training.loraplus_lr_ratio is {ratio}, but training.learning_rate 0 has no multiples; raise it"
            )


@dataclass(frozen=True)
class ParallelSection:
    """Devices along each axis of the mesh; -1 for one of them stands for all that the others leave.

    Attributes:
        data: Copies of the model, each with its own rows.
        fsdp: Devices that share one copy's weights, each with its own rows.
        tensor: Devices that share each matrix product.
        context: Devices that share each row's positions.
    """

    data: int = 1
    fsdp: int = 1
    tensor: int = 1
    context: int = 1

    def __post_init__(self) -> None:
        sizes = asdict(self)
        for name, value in sizes.items():
            if value < 1 and value != -1:
                raise InputError(f"parallel.{name} is {value}, expected at least 1, or -1 for all devices left")
        rest = [name for name, value in sizes.items() if value == -1]
        if len(rest) > 1:
            raise InputError(f"parallel.{' and parallel.'.join(rest)} are -1; only one axis can take what is left")


@dataclass(frozen=True)
class LoggingSection:
    """What is written beside metrics.jsonl.

    Attributes:
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
