"""What the commands' argument parsers share."""

import argparse
from collections.abc import Callable, Sequence
from typing import NoReturn

from phi3_jax.config.generation_names import is_known
from phi3_jax.config.hub_options import Hub
from phi3_jax.config.names import nearest
from phi3_jax.system.compat import option_strings, positionals
from phi3_jax.system.errors import InputError

# What options were called before, in the spelling of now.
FORMER_NAMES = {"--output-dir": "--output"}
# What other programs call the options of commands, to be named where there is no such option.
_WORDS = {
    "adapter": "adapter-path adapters checkpoint lora lora-path lora-weights peft peft-model",
    "base": "base-model",
    "batch-size": "bs per-device-eval-batch-size",
    "data": "dataset dataset-name eval-data file test-file",
    "dtype": "bf16 fp16 precision torch-dtype",
    "do-sample": "sample sampling",
    "max-new-tokens": "length max-tokens n-predict num-tokens",
    "merge": "fuse merged",
    "metrics": "metric",
    "model": "base base-model checkpoint model-id model-name model-name-or-path model-path",
    "new-tokens": "max-new-tokens max-tokens",
    "num-return-sequences": "num-samples",
    "output": "o out output-file output-path save-path",
    "prompt": "input instruction message question text",
    "quantization": "load-in-4bit load-in-8bit quant quantize",
    "system": "system-message system-prompt",
    "temperature": "temp",
}
_POSITIONAL_WORDS = {"adapter": "adapter-path lora lora-path peft", "path": "adapter checkpoint folder model run"}


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
        add_saying_arguments(self)

    def error(self, message: str, *_: object) -> NoReturn:
        raise InputError(f"{message}; see {self.prog} --help")

    def parse(self, argv: Sequence[str]) -> argparse.Namespace:
        """The parsed arguments; `--help` prints and leaves with status 0."""
        # Before argparse, which complains of what is missing first, where a name is only misspelt.
        return self.parse_args(self.spelt(argv, unknown=self._refuse))

    def _own_name(self, name: str) -> str | None:
        """The option that is meant by a name whose hyphens and underscores may be others; None for one there is not."""
        known = option_strings(self)
        if name in known:
            return name
        plain = name.replace("_", "-")
        plain = FORMER_NAMES.get(plain, plain)
        return next((option for option in known if option.startswith("--") and option.replace("_", "-") == plain), None)

    def spelt(self, argv: Sequence[str], unknown: Callable[[str], None] = lambda name: None) -> list[str]:
        """The arguments with every option under the name that it has now; `unknown` is called with others' names."""
        tokens: list[str] = []
        rest = iter(argv)
        for token in rest:
            if token == "--":
                return [*tokens, token, *rest]
            name, equals, value = token.partition("=")
            if name.startswith("--"):
                own = self._own_name(name)
                if own is None:
                    unknown(name)
                name = own or name
            tokens.append(f"{name}{equals}{value}")
        return tokens

    def _refuse(self, name: str) -> None:
        """Raises `InputError` for a name that no option has."""
        word = name.lstrip("-").replace("_", "-")
        options = [option[2:] for option in self._options()]
        if positional := self._positional(word):
            raise InputError(f"unknown option {name}; give it by itself: {self.prog} {positional}")
        setting = word.replace("-", "_")
        if "max-new-tokens" in options and is_known(setting):  # a command that answers
            raise InputError(f"unknown option {name}; {setting} of transformers is not implemented here, leave it out")
        meant = [option for option, words in _WORDS.items() if option in options and word in words.split()]
        section, dot, key = word.rpartition(".")
        here = [option for option in options if option.startswith(f"{section}.")] if dot else []
        # By its key alone, the first where two sections have it.
        by_key = {option.rpartition(".")[2]: option for option in reversed(here or options)}
        near = nearest(key, by_key)
        found = meant[0] if meant else nearest(word, options) if near is None else by_key[near]
        advice = f"did you mean --{found}?" if found else f"see {self.prog} --help"
        raise InputError(f"unknown option {name}; {advice}")

    def _options(self) -> list[str]:
        """The options that may be named to whoever missed one."""
        return [option for option in option_strings(self) if option.startswith("--")]

    def _positional(self, word: str) -> str | None:
        """What an argument without an option's name is called, where the word means that."""
        for dest, shown in positionals(self).items():
            if word in (dest, *_POSITIONAL_WORDS.get(dest, "").split()):
                return shown
        return None


def add_saying_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that say how much is said; `phi3_jax.cli.main` reads them before any command does."""
    parser.add_argument("-v", "--verbose", action="store_true", help="say more of what goes on, and how long it took")
    parser.add_argument("-q", "--quiet", action="store_true", help="say nothing but results, warnings and errors")


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
