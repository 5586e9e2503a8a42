"""What the commands' argument parsers share."""

import argparse
from collections.abc import Callable, Sequence
from typing import NoReturn

from phi3_jax.config.hub_options import Hub
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


def add_base_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that say which model, for commands that take adapters beside it, or one without."""
    parser.add_argument(
        "--model",
        metavar="PATH",
        help="checkpoint folder or hub id (default: the base that the adapter was trained on, at its revision)",
    )
    parser.add_argument(
        "--dtype",
        choices=("auto", "bfloat16", "float32", "float16"),
        default="auto",
        help="type of the weights in memory; auto: bfloat16, on a CPU float32, which is faster there",
    )
    parser.add_argument(
        "--quantization", choices=("nf4", "int8"), help="what the linear layers of the base are kept in"
    )
    add_hub_arguments(parser)


def add_hub_arguments(
    parser: argparse.ArgumentParser, revision: str = "branch, tag or commit of the model on the hub"
) -> None:
    """The options that say how the hub is asked; `hub_of` reads them."""
    add = parser.add_argument
    add("--revision", metavar="NAME", help=revision)
    add("--cache-dir", metavar="DIR", help="where hub downloads are kept (default: huggingface_hub's)")
    add("--local-files-only", action="store_true", help="never ask the network")


def hub_of(arguments: argparse.Namespace) -> Hub:
    """What the options of `add_hub_arguments` say."""
    return Hub(arguments.revision, cache_dir=arguments.cache_dir, local_files_only=arguments.local_files_only)
