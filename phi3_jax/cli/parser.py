"""What the commands' argument parsers share."""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

from phi3_jax.config.names import nearest
from phi3_jax.system.compat import option_strings
from phi3_jax.system.errors import InputError

# What options were called before, underscores (for which hyphens stand now) left aside.
FORMER_NAMES = {"--output-dir": "--output"}


class Parser(argparse.ArgumentParser):
    """argparse, whose errors are an `InputError` of one line and name the nearest option."""

    def __init__(self, command: str, description: str, epilog: str | None = None) -> None:
        super().__init__(
            prog=f"phi3-jax {command}",
            description=description,
            epilog=epilog,
            allow_abbrev=False,
            formatter_class=argparse.HelpFormatter,
        )

    def error(self, message: str, *_: object) -> NoReturn:
        raise InputError(f"{message}; see {self.prog} --help")

    def parse(self, argv: Sequence[str]) -> argparse.Namespace:
        """The parsed arguments; `--help` prints and leaves with status 0."""
        # Before argparse, which complains of what is missing first, where a name is only misspelt.
        return self.parse_args(self.spelt(argv, unknown=self._refuse))

    def spelt(self, argv: Sequence[str], unknown: Callable[[str], None] = lambda name: None) -> list[str]:
        """The arguments with every option under the name that it has now; `unknown` is called with others' names."""
        known = option_strings(self)
        tokens = []
        for token in argv:
            name, equals, value = token.partition("=")
            if name.startswith("--") and len(name) > 2 and name not in known:
                hyphened = name.replace("_", "-")
                now = FORMER_NAMES.get(hyphened, hyphened)
                if now in known:
                    name = now
                else:
                    unknown(name)
            tokens.append(f"{name}{equals}{value}")
        return tokens

    def _refuse(self, name: str) -> None:
        """Raises `InputError` for a name that no option has."""
        options = [option.lstrip("-") for option in option_strings(self)]
        section, dot, key = name.lstrip("-").rpartition(".")
        near = [option for option in options if option.startswith(f"{section}.")] if dot else options
        # By its key alone, so that --lr means --training.learning_rate; the first where two have it.
        known: dict[str, str] = {}
        for option in near:
            known.setdefault(option.rpartition(".")[2], option)
        found = known[nearest(key, list(known))] if known else nearest(name.lstrip("-"), options)
        raise InputError(f"unknown option {name}; did you mean --{found}?")


def positive(value: str | int) -> int:
    """An option's whole number of at least 1; jsonargparse asks again for what has been read."""
    if not str(value).isdecimal() or int(value) < 1:
        raise argparse.ArgumentTypeError(f"{value} is no whole number of at least 1")
    return int(value)


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
