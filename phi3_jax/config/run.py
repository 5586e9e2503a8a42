"""`RunConfig`: the configuration of a whole run, read from dictionaries and written as YAML."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import get_type_hints

import yaml

from phi3_jax.config.parse import parse_sections
from phi3_jax.config.plain import plain
from phi3_jax.config.profiled import check_steps_come
from phi3_jax.config.scripts import Given, sections_of_script
from phi3_jax.config.sections import (
    EVAL,
    DataSection,
    LoggingSection,
    ModelSection,
    ParallelSection,
    PeftSection,
)
from phi3_jax.config.training import FIGURES, TrainingSection
from phi3_jax.system.errors import InputError
from phi3_jax.system.secrets import redact


@dataclass(frozen=True)
class RunConfig:
    """A whole run: `phi3-jax train --config FILE --section.key value`.

    Attributes:
        model: The base model.
        peft: The adapter.
        data: Training and evaluation rows.
        training: How to train.
        parallel: Devices along each axis of the mesh.
        logging: What is written beside metrics.jsonl.
        given: The names `section.key` that somebody gave; None where that is not known.

    Raises:
        InputError: Two sections contradict each other.
    """

    model: ModelSection
    peft: PeftSection = field(default_factory=PeftSection)
    data: DataSection = field(default_factory=DataSection)
    training: TrainingSection = field(default_factory=TrainingSection)
    parallel: ParallelSection = field(default_factory=ParallelSection)
    logging: LoggingSection = field(default_factory=LoggingSection)
    given: frozenset[str] | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        _check_evaluation(self)
        _check_streaming(self)
        _check_order(self)
        _check_adapter(self)
        _check_profile(self)

    @classmethod
    def from_dict(cls, raw: Mapping[str, object]) -> RunConfig:
        """Reads nested dictionaries, `{"model": {...}, "training": {...}}`, as a YAML file holds them.

        The names of transformers', TRL's and PEFT's arguments are understood; those without a meaning
        here are named in a printed line.

        Raises:
            InputError: A key is unknown or a value wrong.

        Example:
            >>> from phi3_jax import RunConfig
            >>> raw = {"model": {"name_or_path": "base"}, "training": {"max_steps": 40, "fsdp": "full_shard"}}
            >>> run = RunConfig.from_dict(raw)
            passed over: training.fsdp (the section parallel says how devices share the work)
            >>> run.training.max_steps, run.training.learning_rate
            (40, 0.0001)
            >>> RunConfig.from_dict(run.to_dict()) == run
            True
        """
        run, notices = parse_run_config(raw)
        for notice in notices:
            print(notice)
        return run

    @classmethod
    def from_dicts(
        cls,
        *,
        model: str | Given,
        training_config: Given,
        peft_config: Given,
        data: str | Mapping[str, object],
        quantization_config: Given | None = None,
    ) -> RunConfig:
        """Takes the dictionaries of a script for TRL and PEFT as they are, with what they mean there.

        What a dictionary does not name has its library's default, not this package's: without `lora_alpha` it is
        8, without `packing` nothing is packed. Text is taken as TRL takes it, with `data.template` `none` and
        `data.final_eos` true. What is passed over is said in a printed line, with the reason.

        Args:
            model: Checkpoint folder or hub id, or the whole section.
            training_config: What the script gives to TrainingArguments, or to SFTConfig, whose defaults are taken
                where a name is one that only it has.
            peft_config: What it gives to LoraConfig.
            data: File, folder or hub dataset id to train on, or the whole section, whose keys win over defaults.
            quantization_config: What it gives to BitsAndBytesConfig.

        Raises:
            InputError: A key is unknown, not supported, or a value wrong.

        Example:
            >>> from phi3_jax import RunConfig
            >>> run = RunConfig.from_dicts(
            ...     model="microsoft/Phi-3-mini-4k-instruct",
            ...     training_config={"learning_rate": 5e-6, "bf16": True, "optim": "adamw_torch"},
            ...     peft_config={"r": 16, "target_modules": "all-linear", "task_type": "CAUSAL_LM"},
            ...     data="chats.jsonl",
            ... )
            >>> run.model.dtype, run.training.optim, run.data.train
            ('bfloat16', 'adamw', 'chats.jsonl')
            >>> run.peft.lora_alpha, run.data.packing, run.training.num_train_epochs
            (8.0, False, 3.0)
        """
        return cls._of_script(model, training_config, peft_config, data, quantization_config)

    @classmethod
    def from_trl(
        cls,
        args: Given,
        peft_config: Given | None = None,
        *,
        model: str | Given,
        data: str | Mapping[str, object],
        quantization_config: Given | None = None,
    ) -> RunConfig:
        """Takes the objects that a script gives to SFTTrainer, as `from_dicts` takes dictionaries.

        Args:
            args: SFTConfig or TrainingArguments.
            peft_config: LoraConfig; None trains all weights, as SFTTrainer does.
            model: Checkpoint folder or hub id, the whole section, or TRL's ModelConfig.
            data: File, folder or hub dataset id to train on, or the whole section.
            quantization_config: BitsAndBytesConfig.

        Raises:
            InputError: A setting is not supported, or a value wrong.

        Example:
            >>> from phi3_jax import RunConfig
            >>> class SFTConfig:  # as TRL's
            ...     def to_dict(self):
            ...         return {"packing": False, "max_length": 512, "bf16": True, "hub_token": "<HUB_TOKEN>"}
            >>> peft_config = {"r": 4, "target_modules": ["o_proj"]}
            >>> run = RunConfig.from_trl(SFTConfig(), peft_config, model="base", data="chats.jsonl")
            >>> run.data.max_length, run.peft.lora_alpha
            (512, 8.0)
        """
        return cls._of_script(model, args, peft_config, data, quantization_config)

    @classmethod
    def _of_script(
        cls,
        model: str | Given,
        training_config: Given,
        peft_config: Given | None,
        data: str | Mapping[str, object],
        quantization_config: Given | None,
    ) -> RunConfig:
        sections, notices = sections_of_script(
            model=model,
            training_config=training_config,
            peft_config=peft_config,
            data=data,
            quantization_config=quantization_config,
        )
        for notice in notices:
            print(notice)
        run = cls.from_dict(sections)
        named = peft_config if isinstance(peft_config, Mapping) else {}
        # Not what the libraries' defaults filled in.
        given = frozenset(f"peft.{name}" for name, value in named.items() if plain(value) not in (None, [], (), {}))
        return replace(run, given=given)

    def changed(self, changes: Mapping[str, object]) -> RunConfig:
        """The run with other values, by `section.key`.

        Raises:
            InputError: They contradict the rest.
        """
        sections: dict[str, dict[str, object]] = {}
        for name, value in changes.items():
            section, _, key = name.partition(".")
            sections.setdefault(section, {})[key] = value
        given = None if self.given is None else self.given.union(changes)
        changed = {name: replace(getattr(self, name), **values) for name, values in sections.items()}
        return replace(self, **changed, given=given)

    def check_evaluation_rows(self) -> None:
        """Looks whether there are rows for the evaluations that are wanted, once all are known.

        Raises:
            InputError: There are none.
        """
        training = self.training
        if self.data.has_eval:
            return
        wanted = [name for name in NEED_EVALUATIONS if getattr(training, name)]
        if training.save_strategy == "best":
            wanted.append("save_strategy")
        if training.eval_strategy == "epoch":
            wanted.append("eval_strategy")
        if training.eval_strategy == "steps" and training.eval_steps is not None:
            wanted.append("eval_steps")
        if wanted:
            raise InputError(
                f"training.{wanted[-1]} is {str(getattr(training, wanted[-1])).lower()}, but there are no evaluation "
                "rows; give data.eval or data.eval_fraction, or eval_dataset in Python"
            )

    def to_dict(self) -> dict[str, dict[str, object]]:
        """Nested plain values, JSON and YAML alike; `from_dict` reads them back equal, but for a token."""
        sections = {
            section: {key: _plain(value) for key, value in asdict(getattr(self, section)).items()}
            for section in SECTIONS
        }
        sections["training"]["hub_token"] = None
        return sections

    def to_yaml(self) -> str:
        """What a run writes as config.yaml and `--config` reads; tokens are left out, see `phi3_jax.system.secrets`."""
        return redact(yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True))


# Settings of training that look at evaluations before the end.
NEED_EVALUATIONS = ("load_best_model_at_end", "early_stopping_patience")
# Section -> its dataclass.
SECTIONS: dict[str, type] = {name: kind for name, kind in get_type_hints(RunConfig).items() if name != "given"}


def parse_run_config(raw: Mapping[str, object]) -> tuple[RunConfig, list[str]]:
    """Makes a run of nested values, typed or the text of a command line.

    Returns:
        The run, and lines to print about names of other libraries that were ignored.

    Raises:
        InputError: For the first thing that is wrong.
    """
    sections, notices = parse_sections(raw, SECTIONS)
    given = frozenset(f"{name}.{key}" for name, values in raw.items() if isinstance(values, Mapping) for key in values)
    return RunConfig(**sections, given=given), notices


def _plain(value: object) -> object:
    """What YAML and JSON know: lists for tuples, and plain dictionaries."""
    if isinstance(value, Mapping):
        return {key: _plain(entry) for key, entry in value.items()}
    return [_plain(entry) for entry in value] if isinstance(value, tuple) else value


def _check_evaluation(run: RunConfig) -> None:
    """Raises `InputError` where something needs evaluations that there are not."""
    training = run.training
    for name in NEED_EVALUATIONS:
        value = getattr(training, name)
        # Without rows there are none either, but those may be given to `train`.
        if value and run.data.has_eval and not training.evaluates_midway:
            why = "training.eval_strategy is no" if training.eval_strategy == "no" else "training.eval_steps is null"
            raise InputError(
                f"training.{name} is {str(value).lower()}, but {why}, so that nothing is evaluated before the end; "
                "give training.eval_steps, or training.eval_strategy epoch"
            )
    if training.load_best_model_at_end and training.save_strategy == "no":
        raise InputError(
            "training.load_best_model_at_end is true, but training.save_strategy is no; give steps, epoch or best"
        )
    if training.save_strategy == "best" and training.eval_strategy == "no":
        raise InputError(
            "training.save_strategy is best, but training.eval_strategy is no, so that nothing is the best; give "
            "steps or epoch"
        )
    _check_metric(run)


def _check_metric(run: RunConfig) -> None:
    """Raises `InputError` where evaluations are to be compared by what they do not measure."""
    if not run.data.has_eval:
        return  # their names may be given to `train`
    measured = [f"{of}_{figure}" for of in dict.fromkeys([EVAL, *run.data.eval_sources]) for figure in FIGURES]
    if run.training.best_metric not in measured:
        raise InputError(
            f"training.metric_for_best_model is {run.training.metric_for_best_model}, but what is measured is "
            f"{', '.join(measured)}; give one of them"
        )


def _check_streaming(run: RunConfig) -> None:
    """Raises `InputError` where something needs to know how many streamed rows there are."""
    training = run.training
    if not run.data.streaming:
        return
    if training.max_steps < 1:
        raise InputError(
            "data.streaming is true, so that nobody knows how many steps an epoch has; give training.max_steps"
        )
    for name in ("logging", "eval", "save"):
        if getattr(training, f"{name}_strategy") == "epoch":
            raise InputError(
                f"training.{name}_strategy is epoch, but with data.streaming nobody knows where one ends; give steps, "
                f"and training.{name}_steps"
            )


def _check_order(run: RunConfig) -> None:
    """Raises `InputError` where rows cannot come in the order that is asked for."""
    training = run.training
    if training.group_by_length and not run.data.shuffle:
        raise InputError(
            "training.group_by_length is true, but data.shuffle false wants rows as they come; leave one of them out"
        )
    for name in ("group_by_length", "dataloader_drop_last"):
        if getattr(training, name) and run.data.streaming:
            raise InputError(
                f"training.{name} is true, but of rows that are streamed nobody knows which are still to come; "
                "leave it out"
            )


def _check_profile(run: RunConfig) -> None:
    """Raises `InputError` where steps are to be recorded that never come, as far as it is known how many there are."""
    steps, total = run.logging.profiled_steps, run.training.max_steps
    if steps is not None and total > 0:
        check_steps_come(steps, total)


def _check_adapter(run: RunConfig) -> None:
    """Raises `InputError` where the adapter's settings do not go with the base or the optimizer."""
    start, quantization = run.peft.init_lora_weights, run.model.quantization
    if start == "loftq" and quantization is None:
        raise InputError(
            "peft.init_lora_weights is loftq, which starts from what quantisation loses, but model.quantization is "
            "none; give nf4"
        )
    if str(start).startswith("pissa") and quantization is not None:
        raise InputError(
            f"peft.init_lora_weights is {start}, which takes the base's largest directions before it is rounded, "
            f"but model.quantization is {quantization}; leave quantization out, or give loftq"
        )
    if run.peft.full_finetuning and run.model.quantization is not None:
        raise InputError(
            f"model.quantization is {run.model.quantization}, but peft.full_finetuning trains the base's own "
            "weights, and rounded ones cannot; leave one out"
        )
    if run.peft.full_finetuning and run.peft.init_from is not None:
        raise InputError(
            f"peft.init_from is {run.peft.init_from}, but peft.full_finetuning trains no adapter; leave one out"
        )
    training = run.training
    for name, given in (("optim", training.optim == "lorafa"), ("loraplus_lr_ratio", training.loraplus_lr_ratio)):
        if run.peft.full_finetuning and given:
            raise InputError(
                f"training.{name} is {getattr(training, name)}, but peft.full_finetuning trains no adapter; "
                "leave one out"
            )
