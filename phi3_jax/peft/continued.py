"""Runs that continue an adapter (`peft.init_from`): on its base, with its tokenizer, as it is configured.

PEFT's `from_pretrained(..., is_trainable=True)` takes an adapter's configuration from its file. So does a run: what is
given beside `init_from` has to agree with it. The one exception is `lora_dropout`, which says how to train and not what
the adapter is: where it is given, that value counts from here on.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields, replace

from phi3_jax.config.lora import LoraConfig
from phi3_jax.config.run import RunConfig
from phi3_jax.config.sections import PeftSection
from phi3_jax.hf.hub import CHECKPOINT_FILES
from phi3_jax.lora.fresh import resolved
from phi3_jax.lora.targets import config_targets, saved_modules, tied_ends
from phi3_jax.model import Phi3ForCausalLM
from phi3_jax.peft.adapter import PeftAdapter
from phi3_jax.peft.base import open_base
from phi3_jax.peft.config import CONFIG_FILE, ties_weights
from phi3_jax.peft.tokenizer import BaseOfAdapters
from phi3_jax.system.errors import InputError

# What says how fresh arrays begin, of which there are none.
BEGINNINGS = ("init_lora_weights", "loftq_config", "eva_config")
# How to train it, what changes nothing here, and what it is called by.
OTHERS = ("lora_dropout", "bias", "ensure_weight_tying", "task_type", "base_model_name_or_path", "revision")
# All else makes an adapter what it is.
STRUCTURE = tuple(field.name for field in fields(LoraConfig) if field.name not in (*BEGINNINGS, *OTHERS))


def open_run_base(run: RunConfig, *, patterns: Sequence[str] = CHECKPOINT_FILES) -> BaseOfAdapters:
    """The checkpoint of a run, with the adapter of `peft.init_from` beside it, whose revision and tokenizer count.

    Args:
        run: Its settings.
        patterns: Of the files to download.

    Raises:
        InputError: As `open_base` and `PeftAdapter.open`.
    """
    model, peft = run.model, run.peft
    adapters = []
    if peft.init_from is not None and not peft.full_finetuning:
        adapters.append(PeftAdapter.open(peft.init_from, model.hub.at(None)))
    return open_base(model.name_or_path, adapters, model.hub, patterns=patterns)


def as_trained(run: RunConfig, base: BaseOfAdapters) -> tuple[RunConfig, list[str]]:
    """The run with the settings of the adapter that it continues in place of its own; itself where it continues none.

    Args:
        run: Its settings, and which of them were given.
        base: As `open_run_base` gives it.

    Returns:
        The run, and lines to print.

    Raises:
        InputError: Where a setting that was given contradicts the adapter's, with both values.
    """
    if not base.adapters:
        return run, []
    (adapter,) = base.adapters
    config = adapter.load(base.shapes, base).config
    _check_tied(adapter, base, config)
    given = given_keys(run)
    _check(run.peft, given, config, base.shapes, adapter)
    notices = []
    dropout = config.lora_dropout
    if "lora_dropout" in given and run.peft.lora_dropout != dropout:
        notices.append(
            f"peft.lora_dropout is {run.peft.lora_dropout:g} from here on; {adapter.name} was trained with {dropout:g}"
        )
        dropout = run.peft.lora_dropout
    values = {name: getattr(config, name) for name in (*STRUCTURE, *BEGINNINGS)}
    peft = replace(run.peft, **values, lora_dropout=dropout)
    return replace(run, peft=peft, model=replace(run.model, revision=base.revision)), notices


def given_keys(run: RunConfig) -> set[str]:
    """The keys of `peft` that somebody gave; of a run that was made in Python those with another value than usual."""
    if run.given is not None:
        return {name.removeprefix("peft.") for name in run.given if name.startswith("peft.")}
    usual = PeftSection()
    return {name for name in PeftSection.__dataclass_fields__ if getattr(run.peft, name) != getattr(usual, name)}


def _check(
    peft: PeftSection, given: Iterable[str], config: LoraConfig, model: Phi3ForCausalLM, adapter: PeftAdapter
) -> None:
    """Raises `InputError` with all that contradicts the adapter's configuration."""
    asked: dict[str, object] = {name: getattr(peft, name) for name in STRUCTURE if name in given}
    wrong = [] if _is_same(config, asked, model) else [n for n in asked if not _is_same(config, {n: asked[n]}, model)]
    for name in BEGINNINGS:
        # True asks for nothing in particular.
        if name in given and getattr(peft, name) not in (None, True, getattr(config, name)):
            wrong.append(name)
    if wrong:
        both = (f"peft.{name} is {_text(getattr(peft, name))} (there {_text(getattr(config, name))})" for name in wrong)
        raise InputError(
            f"peft.init_from goes on with {adapter.name} as that is configured, but {', '.join(both)}; leave that "
            "out, or start a fresh adapter without init_from"
        )


def _check_tied(adapter: PeftAdapter, base: BaseOfAdapters, config: LoraConfig) -> None:
    """Raises `InputError` for an adapter that embedding and output head share, which would part here."""
    if base.shapes.lm_head is not None or not (adapter.folder / CONFIG_FILE).exists():
        return
    ends = tied_ends(base.shapes, config_targets(base.shapes, config), config.modules_to_save)
    if ends and ties_weights(adapter.folder):
        raise InputError(
            f"peft.init_from goes on with {adapter.name}, whose ensure_weight_tying has {' and '.join(ends)} train as "
            "one, which is not supported: they would part; merge it (export --merge), and train on that"
        )


def _is_same(config: LoraConfig, changes: Mapping[str, object], model: Phi3ForCausalLM) -> bool:
    """Whether the configuration describes the same adapters with the changes."""
    try:
        changed = LoraConfig(**{**{name: getattr(config, name) for name in STRUCTURE}, **changes})
        saved = saved_modules(model, changed.modules_to_save or ())
        found = resolved(changed, config_targets(model, changed), model.config.num_hidden_layers, saved)
    except InputError:
        return False
    return all(getattr(found, name) == getattr(config, name) for name in STRUCTURE)


def _text(value: object) -> str:
    return str(list(value)) if isinstance(value, tuple) else str(value)
