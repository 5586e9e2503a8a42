"""The options for how to generate and with which adapters, of the commands that answer."""

import argparse
from collections.abc import Container
from dataclasses import dataclass, fields
from functools import cached_property
from typing import TYPE_CHECKING, Any, get_type_hints

import docstring_parser

from phi3_jax.cli.parser import hub_of, positive
from phi3_jax.config.generation import COUNTS, OF_CHECKPOINT, SAMPLING, GenerationConfig
from phi3_jax.config.model import Phi3Config
from phi3_jax.config.names import BASE, NONE
from phi3_jax.data.tokenizer import Tokenizer
from phi3_jax.system.errors import InputError

if TYPE_CHECKING:
    from phi3_jax.lora import Lora
    from phi3_jax.model import Phi3ForCausalLM
    from phi3_jax.peft.tokenizer import BaseOfAdapters

# For a command that answers as the checkpoint says, with the length where it says none.
AS_CHECKPOINT = (
    "what is not given is as generation_config.json says, and --max-new-tokens {} where it says nothing; "
    "--temperature, --top-k, --top-p and --min-p switch --do-sample on"
)
_KINDS: dict[object, dict[str, Any]] = {
    bool: {"action": argparse.BooleanOptionalAction},
    bool | str: {"choices": ("true", "false", "never")},
    int: {"type": int, "metavar": "N"},
    int | tuple[int, ...]: {"type": int, "metavar": "N"},
    int | None: {"type": int, "metavar": "N"},
    float: {"type": float, "metavar": "X"},
    float | None: {"type": float, "metavar": "X"},
    tuple[str, ...]: {"action": "append", "metavar": "TEXT"},
}


def add_adapters_argument(parser: argparse.ArgumentParser, help: str) -> None:
    """Adds `--adapter`, which may be given more than once."""
    parser.add_argument("--adapter", action="append", default=[], metavar="[NAME=]PATH", help=help)


def add_generation_arguments(parser: argparse.ArgumentParser, about: str, *, without: Container[str] = ()) -> None:
    """An option for every setting of `GenerationConfig` but those that belong to the checkpoint.

    Args:
        parser: Gets the options, whose help is the docstring of the settings.
        about: What the help says of them together.
        without: Settings that the command has no option for.
    """
    add = parser.add_argument_group("how to answer", about).add_argument
    texts = {part.arg_name: part.description for part in docstring_parser.parse(GenerationConfig.__doc__ or "").params}
    hints = get_type_hints(GenerationConfig)
    for name in (field.name for field in fields(GenerationConfig)):
        if name not in OF_CHECKPOINT and name not in without:
            option = "--stop" if name == "stop_strings" else f"--{name.replace('_', '-')}"
            kind = _KINDS[hints[name]] | ({"type": positive} if name in COUNTS else {})
            add(option, dest=name, default=None, help=texts[name], **kind)


def given_settings(arguments: argparse.Namespace, *, without: Container[str] = ()) -> dict[str, Any]:
    """The settings of `GenerationConfig` for which an option was given.

    Args:
        arguments: Of a parser that has the options of `add_generation_arguments`.
        without: Settings that the command has no option for, whatever else is called so there.
    """
    names = [field.name for field in fields(GenerationConfig) if field.name not in without]
    given = {name: value for name, value in vars(arguments).items() if name in names and value is not None}
    if "early_stopping" in given:
        given["early_stopping"] = {"true": True, "false": False}.get(given["early_stopping"], "never")
    return given


def generation_settings(
    arguments: argparse.Namespace, config: Phi3Config, tokenizer: Tokenizer, *, max_new_tokens: int
) -> GenerationConfig:
    """The settings that the options ask for, over the checkpoint's own; one of the draw switches drawing on."""
    from phi3_jax.generation.text import answer_settings

    given = given_settings(arguments)
    drawing = [name for name in SAMPLING if name in given and (name, given[name]) != ("temperature", 0)]
    if drawing and arguments.do_sample is False:
        raise InputError(f"--{drawing[0].replace('_', '-')} has no effect with --no-do-sample; leave one of them out")
    if not hasattr(arguments, "num_return_sequences"):  # a command that shows one answer, whatever the checkpoint says
        given["num_return_sequences"] = 1
    return answer_settings(config, tokenizer, given, max_new_tokens=max_new_tokens)


@dataclass(frozen=True)
class Loaded:
    """The base and the adapters that a command was asked for.

    Attributes:
        checkpoint: The base's.
        tokenizer: The one that the adapters were trained with, with the chat template.
        adapters: By name; None for `none`, the base.
        dtype: Of the weights.
        quantization: Of the weights.
    """

    checkpoint: "BaseOfAdapters"
    tokenizer: Tokenizer
    adapters: "dict[str, Lora | None]"
    dtype: str
    quantization: str | None

    @property
    def config(self) -> Phi3Config:
        """The base's, known before its weights are read."""
        return self.checkpoint.config

    @cached_property
    def model(self) -> "Phi3ForCausalLM":
        """Its weights, read when they are first asked for: all else that can be wrong is looked at before."""
        return self.checkpoint.load_model(dtype=self.dtype, quantization=self.quantization)


def load(arguments: argparse.Namespace) -> Loaded:
    """Opens what the options of `add_base_arguments` and `add_adapters_argument` ask for, and loads the adapters."""
    from phi3_jax.chat.session import check_name
    from phi3_jax.parallel.mesh import auto_dtype, device_line
    from phi3_jax.peft.adapter import PeftAdapter
    from phi3_jax.peft.base import open_base
    from phi3_jax.peft.names import named
    from phi3_jax.system.telling import tell_first

    hub = hub_of(arguments)
    opened: dict[str, PeftAdapter | None] = {}
    for text in arguments.adapter:
        if text == NONE:
            opened[BASE] = None
            continue
        name, path = named(text)
        check_name(name, opened)
        opened[name] = PeftAdapter.open(path, hub.at(None))
    tell_first(device_line)
    checkpoint = open_base(arguments.model, [adapter for adapter in opened.values() if adapter is not None], hub)
    tokenizer, shapes = checkpoint.tokenizer, checkpoint.shapes
    adapters = {name: None if adapter is None else adapter.load(shapes, checkpoint) for name, adapter in opened.items()}
    return Loaded(checkpoint, tokenizer, adapters, auto_dtype(arguments.dtype), arguments.quantization)
