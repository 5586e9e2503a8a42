"""`training`, the section of a run that says how to train.

The `Attributes` are the command line's help texts. The section checks its own values when it is made.
"""

import os
from dataclasses import dataclass
from typing import Literal

from phi3_jax.config.ranges import check_range
from phi3_jax.system.errors import InputError


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
        check_range("training", self, at_least_1, low=1)
        check_range("training", self, "warmup_ratio", low=0, high=1)
        check_range("training", self, "adam_beta1 adam_beta2 label_smoothing_factor", low=0, below=1)
        not_negative = (
            "learning_rate warmup_steps num_train_epochs adam_epsilon weight_decay max_grad_norm loraplus_lr_embedding "
            "neftune_noise_alpha seed eval_generations max_skipped_steps"
        )
        check_range("training", self, not_negative, low=0)
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
