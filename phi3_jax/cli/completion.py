"""`phi3-jax completion SHELL`: a script by which a shell completes commands, options and their values.

The script holds all of them, so that a shell completes without starting Python. It is written by hand: argcomplete
starts the program at every key, and shtab, which would do for the other two, knows no fish.
"""

import importlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, get_args, get_type_hints

from phi3_jax.cli.parser import Parser
from phi3_jax.config.recipes import recipe_names
from phi3_jax.config.run import SECTIONS
from phi3_jax.system.compat import Option, options_of

EPILOG = """Write it to where the shell looks for it: of bash ~/.local/share/bash-completion/completions/phi3-jax, of
fish ~/.config/fish/completions/phi3-jax.fish, of zsh a file that ~/.zshrc sources."""

_BASH = """\
_phi3_jax() {{
  local cur="${{COMP_WORDS[COMP_CWORD]}}" command="${{COMP_WORDS[1]}}" option="${{COMP_WORDS[COMP_CWORD-1]}}" words=""
  if [ "$option" = "=" ]; then option="${{COMP_WORDS[COMP_CWORD-2]}}"; fi
  if [ "$cur" = "=" ]; then option="${{COMP_WORDS[COMP_CWORD-1]}}"; cur=""; fi
  COMPREPLY=()
  if [ "$COMP_CWORD" -eq 1 ]; then
    words="{commands}"
  else
    case "$command $option" in
{values}
    *)
      case "$cur" in
      -*)
        case "$command" in
{options}
        esac ;;
      *)
        case "$command" in
{positionals}
        esac ;;
      esac ;;
    esac
  fi
  if [ -n "$words" ]; then COMPREPLY=($(compgen -W "$words" -- "$cur")); fi
}}
complete -o default -F _phi3_jax phi3-jax
"""


@dataclass(frozen=True)
class Command:
    """What is completed of a command: the words that may stand in place of an option, and the options."""

    words: tuple[str, ...]
    options: tuple[Option, ...]


def run(argv: Sequence[str]) -> None:
    """Runs `phi3-jax completion`."""
    shell = make_parser().parse(argv).shell
    about, found = _commands()
    print({"bash": _bash, "zsh": _zsh, "fish": _fish}[shell](about, found), end="")


def make_parser() -> Parser:
    """The options of `phi3-jax completion`."""
    parser = Parser("completion", "A script that has a shell complete these commands and their options.", EPILOG)
    parser.add_argument("shell", choices=("bash", "zsh", "fish"), help="whose script to print")
    return parser


def _commands() -> tuple[dict[str, str], dict[str, Command]]:
    """Every command with its line of help, and what is completed of it."""
    from phi3_jax.cli.main import COMMANDS

    found = {}
    for name in COMMANDS:
        modules = ["benchmark_train", "benchmark_generate"] if name == "benchmark" else [name.replace("-", "_")]
        parsers = [importlib.import_module(f"phi3_jax.cli.{module}").make_parser() for module in modules]
        words: tuple[str, ...] = ("train", "generate") if name == "benchmark" else ()
        words = ("bash", "zsh", "fish") if name == "completion" else words
        words = tuple(recipe_names()) if name == "recipes" else words
        options = {option.name: _with_values(option) for parser in parsers for option in options_of(parser)}
        found[name] = Command(words, tuple(option for option in options.values() if option is not None))
    return COMMANDS, found


def _with_values(option: Option) -> Option | None:
    """The option with the values that its key of a run can have, where these are few; None for a name of others."""
    section, dot, key = option.name[2:].partition(".")
    if not dot or section not in SECTIONS:
        return option
    hints = get_type_hints(SECTIONS[section])
    if key not in hints:
        return None
    kinds = [hints[key], *get_args(hints[key])]
    values = [str(value) for kind in kinds for value in (get_args(kind) if _is_literal(kind) else ())]
    if bool in kinds:
        values += ["true", "false"]
    return Option(option.name, option.help, tuple(values), takes_value=True)


def _is_literal(kind: object) -> bool:
    return getattr(kind, "__origin__", None) is Literal


def _bash(about: dict[str, str], commands: dict[str, Command]) -> str:
    def cases(pairs: Iterator[tuple[str, str]], indent: int) -> str:
        return "\n".join(f"{' ' * indent}'{case}') words=\"{words}\" ;;" for case, words in pairs if words)

    return _BASH.format(
        commands=" ".join([*about, "help", "version"]),
        values=cases(
            (
                (f"{name} {option.name}", " ".join(option.values))
                for name, command in commands.items()
                for option in command.options
            ),
            4,
        ),
        options=cases(
            ((name, " ".join(option.name for option in command.options)) for name, command in commands.items()), 8
        ),
        positionals=cases(((name, " ".join(command.words)) for name, command in commands.items()), 8),
    )


def _zsh(about: dict[str, str], commands: dict[str, Command]) -> str:
    return f"autoload -Uz compinit bashcompinit\ncompinit\nbashcompinit\n{_bash(about, commands)}"


def _fish(about: dict[str, str], commands: dict[str, Command]) -> str:
    lines = [
        f"complete -c phi3-jax -n __fish_use_subcommand -f -a {name} -d {_quoted(text)}" for name, text in about.items()
    ]
    for name, command in commands.items():
        begin = f'complete -c phi3-jax -n "__fish_seen_subcommand_from {name}"'
        lines += [f"{begin} -a '{' '.join(command.words)}'"] if command.words else []
        for option in command.options:
            values = f" -f -a '{' '.join(option.values)}'" if option.values else ""
            takes = " -r" if option.takes_value else ""
            about_it = f" -d {_quoted(option.help)}" if option.help else ""
            lines.append(f"{begin} -l {option.name[2:]}{takes}{values}{about_it}")
    return "\n".join(lines) + "\n"


def _quoted(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace("'", "\\'")
    return f"'{escaped}'"
