"""`training`, the section of a run that says how to train.

The `Attributes` are the command line's help texts. The section checks its own values when it is made.
"""

import os
from dataclasses import dataclass, field
from typing import Literal

from phi3_jax.config.hub_options import PushTarget
from phi3_jax.config.ranges import check_range
from phi3_jax.config.schedules import Settings, Value, schedule_settings
from phi3_jax.system.errors import InputError
from phi3_jax.system.secrets import remember

# What every evaluation measures; in results behind `eval_`, or `eval_NAME_` for a set of rows with a name.
FIGURES = ("loss", "perplexity", "token_accuracy")

# Of options of XLA: this project's, none, or by name over this project's, null for "not that one".
CompilerChoice = dict[str, bool | int | str | None] | Literal["auto", "none"]


@dataclass(frozen=True)
class TrainingSection:
    """How to train: the names of transformers' TrainingArguments, with defaults for LoRA.

    Attributes:
        output_dir: Folder that the run writes; must not hold another run.
        overwrite_output_dir: Replace the run that output_dir holds, unless it is resumed.
        learning_rate: Peak of the schedule.
        lr_scheduler_type: Course of the learning rate after warm-up.
        lr_scheduler_kwargs: Settings of that course, for example {num_cycles: 3} for cosine_with_restarts, {min_lr:
            1e-6} for cosine_with_min_lr, {num_decay_steps: 100} for warmup_stable_decay.
        warmup_ratio: Share of the steps over which the learning rate rises from 0.
        warmup_steps: The same in steps, or below 1 as a share; above 0 it wins over
            warmup_ratio, which 0 leaves it to.
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
        chunk_mlp: In how many pieces a row goes through norms, projections and MLP, forwards and backwards, which
            saves memory; auto cuts rows of which a device has more than 16,384 positions, none leaves them whole.
        compiler_options: What XLA is told beside the program. auto: what is known to be good for the devices
            (docs/parallel.md lists it); none: nothing; or options of XLA's over those of auto, for example
            {xla_tpu_scoped_vmem_limit_kib: 65536}, where null takes one away.
        logging_strategy: When to write a line of metrics.jsonl; a run writes one at its end unless no, and evaluations
            are written always.
        logging_steps: Steps between lines; below 1 a share of all steps, as with the other keys that count steps.
        logging_first_step: Write a line after the first step too.
        eval_strategy: When to evaluate; a run with evaluation rows also evaluates at its end unless no.
        eval_steps: Steps between evaluations; null evaluates at the end alone.
        eval_on_start: Evaluate before the first step, for the report to compare with.
        eval_delay: Evaluations before so many steps, or epochs where eval_strategy is epoch, are left out.
        save_strategy: When to write a checkpoint; best does so after every evaluation that is better than all before.
        save_steps: Steps between checkpoints.
        save_total_limit: Checkpoints to keep; null or 0 keeps all.
        load_best_model_at_end: The adapter written is that of the best evaluation, not the last.
        metric_for_best_model: What makes an evaluation the best, loss where it is null; or perplexity,
            token_accuracy, or those of one of several evaluation sets, as eval_NAME_loss.
        greater_is_better: Whether more of it is better; null goes by what it is.
        early_stopping_patience: Stop after so many evaluations in a row without a better one.
        early_stopping_threshold: By how much an evaluation has to be better for that.
        seed: Of the adapter's start, dropout, the order of rows and the held-out fraction.
        data_seed: Of the order of rows, where that is to differ.
        group_by_length: Rows of like length share a step, with a bit of chance, as transformers draws them.
        dataloader_drop_last: Leave out the rows at the end of an epoch that fill no batch.
        resume_from_checkpoint: Continue the run that output_dir holds, from its last whole checkpoint; or the folder of
            a checkpoint, of this run or another one, to go on from.
        resume_changed: Continue it even with settings that change its result.
        fallback_dir: Folder for the weights where output_dir takes no more, as on a full disk; null: none.
        push_to_hub: Upload the adapter to the hub, at the end and as hub_strategy says.
        hub_model_id: Repository there, owner/name or a name alone; null: the last part of output_dir.
        hub_strategy: When to upload. end: at the end alone; every_save: the adapter of every checkpoint too;
            checkpoint: and the whole newest checkpoint, as last-checkpoint; all_checkpoints: and all of them.
        hub_private_repo: Whether a repository that is made is private; null: as its owner's settings have it.
        hub_revision: Branch to upload to, made where it is not there; null: the main one.
        hub_always_push: Upload a checkpoint also while the upload before is still going on, after it.
        hub_token: What to log in with, written nowhere; null: HF_TOKEN, or what `hf auth login` has stored.
        eval_generations: Evaluation rows answered before and after training, for the report.
        eval_max_new_tokens: Longest of those answers, in tokens.
    """

    output_dir: str = "out"
    overwrite_output_dir: bool = False
    learning_rate: float = 1e-4
    lr_scheduler_type: Literal[
        "constant",
        "constant_with_warmup",
        "linear",
        "cosine",
        "cosine_with_restarts",
        "cosine_with_min_lr",
        "cosine_warmup_with_min_lr",
        "polynomial",
        "inverse_sqrt",
        "warmup_stable_decay",
    ] = "cosine"
    lr_scheduler_kwargs: dict[str, Value] | None = None
    warmup_ratio: float = 0.03
    warmup_steps: int | float = 0
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
    chunk_mlp: Literal["auto", "none"] | int = "auto"
    compiler_options: CompilerChoice = "auto"
    logging_strategy: Literal["no", "steps", "epoch"] = "steps"
    logging_steps: int | float = 10
    logging_first_step: bool = False
    eval_strategy: Literal["no", "steps", "epoch"] = "steps"
    eval_steps: int | float | None = None
    eval_on_start: bool = True
    eval_delay: float = 0
    save_strategy: Literal["no", "steps", "epoch", "best"] = "steps"
    save_steps: int | float = 100
    save_total_limit: int | None = 3
    load_best_model_at_end: bool = False
    metric_for_best_model: str | None = None
    greater_is_better: bool | None = None
    early_stopping_patience: int | None = None
    early_stopping_threshold: float = 0.0
    seed: int = 0
    data_seed: int | None = None
    group_by_length: bool = False
    dataloader_drop_last: bool = False
    resume_from_checkpoint: bool | str = False
    resume_changed: bool = False
    fallback_dir: str | None = None
    push_to_hub: bool = False
    hub_model_id: str | None = None
    hub_strategy: Literal["end", "every_save", "checkpoint", "all_checkpoints"] = "every_save"
    hub_private_repo: bool | None = None
    hub_revision: str | None = None
    hub_always_push: bool = False
    hub_token: str | None = field(default=None, repr=False)
    eval_generations: int = 4
    eval_max_new_tokens: int = 64

    @property
    def evaluates_midway(self) -> bool:
        """Whether an evaluation is wanted before the end."""
        return self.eval_strategy == "epoch" or (self.eval_strategy == "steps" and self.eval_steps is not None)

    @property
    def schedule(self) -> Settings:
        """The course of the learning rate, with its settings.

        Raises:
            InputError: lr_scheduler_kwargs does not go with it.
        """
        return schedule_settings(self.lr_scheduler_type, self.lr_scheduler_kwargs, self.learning_rate)

    @property
    def best_metric(self) -> str:
        """The name of the figure by which evaluations are compared."""
        name = "eval_" + (self.metric_for_best_model or "loss").removeprefix("eval_")
        return name.replace("_mean_token_accuracy", "_token_accuracy")  # as TRL calls it

    @property
    def more_is_better(self) -> bool:
        """Whether more of that figure is better; where nothing is said, of losses and perplexities less is."""
        given = self.greater_is_better
        return not self.best_metric.endswith(("loss", "perplexity")) if given is None else given

    @property
    def push_target(self) -> PushTarget | None:
        """The repository to upload to; None where nothing is to be."""
        if not self.push_to_hub:
            return None
        name = self.hub_model_id or os.path.basename(os.path.abspath(self.output_dir))
        return PushTarget(name, self.hub_private_repo, self.hub_revision, self.hub_token)

    @property
    def remat(self) -> str:
        """The rematerialisation policy in force."""
        return self.remat_policy if self.gradient_checkpointing else "none"

    @property
    def order_seed(self) -> int:
        """Seed of the order of rows."""
        return self.seed if self.data_seed is None else self.data_seed

    def __post_init__(self) -> None:
        if self.hub_token == "<HUB_TOKEN>":  # what transformers' to_dict puts in its place
            object.__setattr__(self, "hub_token", None)
        remember(self.hub_token)  # so that nothing shows it
        if not self.output_dir:  # a shell's variable that is not set
            raise InputError("training.output_dir is empty, expected a folder; give . for this one")
        for name in ("output_dir", "fallback_dir", "resume_from_checkpoint"):  # which a shell does not see in a file
            if isinstance(path := getattr(self, name), str):
                object.__setattr__(self, name, os.path.expanduser(path))
        if self.save_total_limit is not None and self.save_total_limit <= 0:  # other words for null, as in transformers
            object.__setattr__(self, "save_total_limit", None)
        for name in ("logging_steps", "eval_steps", "save_steps", "warmup_steps"):
            self._check_steps(name)
        at_least_1 = (
            "per_device_train_batch_size per_device_eval_batch_size gradient_accumulation_steps save_total_limit "
            "early_stopping_patience eval_max_new_tokens"
        )
        check_range("training", self, at_least_1, low=1)
        if isinstance(self.chunk_mlp, int):
            check_range("training", self, "chunk_mlp", low=1)
        check_range("training", self, "warmup_ratio", low=0, high=1)
        check_range("training", self, "adam_beta1 adam_beta2 label_smoothing_factor", low=0, below=1)
        not_negative = (
            "learning_rate num_train_epochs adam_epsilon weight_decay max_grad_norm loraplus_lr_embedding "
            "neftune_noise_alpha seed data_seed eval_generations max_skipped_steps eval_delay early_stopping_threshold"
        )
        check_range("training", self, not_negative, low=0)
        if self.max_steps != -1 and self.max_steps < 1:
            raise InputError(f"training.max_steps is {self.max_steps}, expected at least 1, or -1 to train by epochs")
        check_range("training", self, "max_steps", low=-1)
        if self.max_steps == -1 and self.num_train_epochs == 0:
            raise InputError("training.num_train_epochs is 0 and training.max_steps -1: nothing to train; raise one")
        if self.early_stopping_threshold and self.early_stopping_patience is None:
            raise InputError(
                f"training.early_stopping_threshold is {self.early_stopping_threshold}, but without patience nothing "
                "reads it; give training.early_stopping_patience too"
            )
        if not self.best_metric.endswith(tuple(f"_{figure}" for figure in FIGURES)):
            raise InputError(
                f"training.metric_for_best_model is {self.metric_for_best_model}, but evaluations measure "
                f"{', '.join(FIGURES)} (of a set with a name eval_NAME_{FIGURES[0]} and so on); give one of them"
            )
        if self.resume_from_checkpoint == "":
            raise InputError("training.resume_from_checkpoint is empty, expected true, false or a checkpoint's folder")
        self._check_loraplus()
        _ = self.schedule

    def _check_steps(self, name: str) -> None:
        """A whole number, whatever its type, or a share of all steps."""
        value, least = getattr(self, name), 0 if name == "warmup_steps" else 1
        if value is None or 0 < value < 1:
            return
        if not (least <= value < float("inf")) or value != int(value):
            raise InputError(
                f"training.{name} is {value}, expected a whole number of at least {least}, or below 1 a share of all "
                "steps"
            )
        object.__setattr__(self, name, int(value))

    def _check_loraplus(self) -> None:
        ratio = self.loraplus_lr_ratio
        if ratio is None:
            if self.loraplus_lr_embedding != type(self).loraplus_lr_embedding:
                raise InputError(
                    f"training.loraplus_lr_embedding is {self.loraplus_lr_embedding}, but without LoRA+ nothing reads "
                    "it; give training.loraplus_lr_ratio too"
                )
            return
        check_range("training", self, "loraplus_lr_ratio", low=1)
        if self.optim == "lorafa":
            raise InputError(
                f"training.loraplus_lr_ratio is {ratio}, but training.optim lorafa trains no A that B could be "
                "faster than; leave one out"
            )
        if self.learning_rate == 0:
            raise InputError(
                f"training.loraplus_lr_ratio is {ratio}, but training.learning_rate 0 has no multiples; raise it"
            )
