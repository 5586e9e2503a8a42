"""What the commands' argument parsers share."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

from phi3_jax.config.names import nearest
from phi3_jax.system.errors import InputError


class Parser(argparse.ArgumentParser):
    """argparse, whose errors are an `InputError` of one line and name the nearest option."""

    def __init__(self, command: str, description: str) -> None:
        super().__init__(prog=f"phi3-jax {command}", description=description, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message}; see {self.prog} --help")

    def parse(self, argv: Sequence[str]) -> argparse.Namespace:
        """The parsed arguments; `--help` prints and leaves with status 0."""
        # Before argparse, which complains of what is missing first, where a name is only misspelt.
        options = list(self._option_string_actions)
        for token in argv:
            name = token.partition("=")[0]
            if name.startswith("--") and len(name) > 2 and name not in options:
                raise InputError(f"unknown option {name}; did you mean {nearest(name, options)}?")
        return self.parse_args(argv)


def positive(text: str) -> int:
    """An option's whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is no whole number of at least 1")
    return int(text)


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that say which model, with an adapter or without, for commands that run one."""
    add_base_arguments(parser)
    parser.add_argument("--adapter", metavar="PATH", help="adapter folder or hub id (PEFT)")


def add_base_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that say which model, for commands that have options of their own for adapters."""
    parser.add_argument("--model", required=True, metavar="PATH", help="checkpoint folder or hub id")
    parser.add_argument(
        "--dtype",
        choices=("auto", "bfloat16", "float32", "float16"),
        default="auto",
        help="type of the weights in memory; auto: bfloat16, on a CPU float32, which is faster there",
    )
    parser.add_argument(
        "--quantization", choices=("nf4", "int8"), help="what the linear layers of the base are kept in"
    )
    parser.add_argument("--revision", metavar="NAME", help="branch, tag or commit of the model on the hub")
    parser.add_argument("--local-files-only", action="store_true", help="never ask the network")


@dataclass(frozen=True)
class Loaded:
    """What `add_model_arguments` asks for. **Fields**: `folder`, the checkpoint's local files; `lora`, None without."""

    folder: Path
    model: Any
    tokenizer: Any
    lora: Any


def load(arguments: argparse.Namespace) -> Loaded:
    """Loads model, tokenizer and adapter."""
    from phi3_jax.peft.adapter import load_adapter

    loaded = load_base(arguments)
    if not arguments.adapter:
        return loaded
    lora = load_adapter(arguments.adapter, loaded.model, local_files_only=arguments.local_files_only)
    return replace(loaded, lora=lora)


def load_base(arguments: argparse.Namespace) -> Loaded:
    """Loads model and tokenizer, what `add_base_arguments` asks for."""
    from phi3_jax.hf.checkpoint import load_model
    from phi3_jax.hf.hub import resolve_checkpoint
    from phi3_jax.hf.tokenizer import load_tokenizer
    from phi3_jax.parallel.mesh import auto_dtype

    local = arguments.local_files_only
    folder = resolve_checkpoint(arguments.model, revision=arguments.revision, local_files_only=local)
    tokenizer = load_tokenizer(folder)
    model = load_model(folder, dtype=auto_dtype(arguments.dtype), quantization=arguments.quantization)
    return Loaded(folder, model, tokenizer, None)
