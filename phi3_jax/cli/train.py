"""`phi3-jax train`: a YAML file, values on the command line over it, and the run."""

import sys
from collections.abc import Collection, Sequence
from dataclasses import fields

import docstring_parser
import jsonargparse

from phi3_jax.cli.parser import add_saying_arguments
from phi3_jax.cli.run_options import RunParser, make_run, read_run
from phi3_jax.config.names import did_you_mean
from phi3_jax.config.parse import add_sections
from phi3_jax.config.run import SECTIONS
from phi3_jax.system.errors import InputError

USAGE = "phi3-jax train [--config FILE] [--section.key value …]"
DESCRIPTION = """Fine-tune a model on chats. Every key of a configuration file can be given, or given anew, on the
command line. The names of transformers' TrainingArguments, TRL's SFTConfig and PEFT's LoraConfig are understood."""
PRINT_CONFIG = "Print the whole configuration and stop."

# The keys that are named first in the short help.
FIRST = {
    "model": "name_or_path dtype quantization",
    "peft": "r lora_alpha target_modules init_from use_dora",
    "data": "train eval max_length packing columns loss_on",
    "training": "output_dir learning_rate num_train_epochs max_steps resume_from_checkpoint",
    "parallel": "data fsdp tensor context",
    "logging": "wandb tensorboard run_name verbosity",
}


def run(argv: Sequence[str]) -> None:
    """Runs `phi3-jax train`."""
    asked = [token for token in argv if token in ("-h", "--help", "--help-all", "--help_all")]
    if asked:
        _print_help(asked[0], [token for token in argv if token not in asked and not token.startswith("-")])
        return
    options = make_parser().parse(argv)
    raw = read_run(options)
    if not raw.keys() - {"logging"}:
        raise InputError(
            "model.name_or_path is not given, nor anything else of a run; phi3-jax init writes a file of one, and "
            "--config RECIPE takes one that phi3-jax recipes lists"
        )
    config = make_run(raw, sys.stderr if options.print_config else sys.stdout)
    if options.print_config:
        print(config.to_yaml(), end="")
        return
    config.data.require_train()

    from phi3_jax.parallel.distributed import initialize
    from phi3_jax.training.loop import train

    initialize()
    if config.parallel.axes == "auto":
        from phi3_jax.parallel.distributed import together
        from phi3_jax.performance.here import with_axes

        with together():
            config = with_axes(config)
    train(config)


def make_parser() -> RunParser:
    """The options of `phi3-jax train`."""
    parser = RunParser("train", DESCRIPTION)
    parser.add_argument("--print-config", action="store_true", help=PRINT_CONFIG)
    parser.add_argument("--help-all", action="store_true", help="show every key with its type and default, and stop")
    return parser


def _print_help(asked: str, words: Sequence[str]) -> None:
    sections = [word for word in words if word in SECTIONS]
    if asked not in ("-h", "--help"):
        _help_parser(SECTIONS).print_help()
    elif sections:
        _help_parser(sections).print_help()
    elif len(words) == 1:
        near = did_you_mean(words[0], SECTIONS) or f"; the sections are {', '.join(SECTIONS)}"
        raise InputError(f"there is no section {words[0]} of a run{near}")
    else:
        print(_summary())


def _summary() -> str:
    """What fits a screen: the sections, and their first keys."""
    lines = [
        f"usage: {USAGE}",
        "",
        "Fine-tune a model on chats. A configuration file and the command line hold the",
        "same keys; those of the command line win. A key's name alone will do where one",
        "section has it: --learning_rate 1e-4. Names of TRL, PEFT and transformers, too.",
        "",
        "  --config FILE   YAML file of these sections, or a recipe's name; may be repeated",
        "  --print-config  print the whole configuration and stop",
        "  -v, -q          say more of what goes on, or nothing but results and errors",
        "",
    ]
    for section, cls in SECTIONS.items():
        about = (docstring_parser.parse(cls.__doc__ or "").short_description or "").partition(";")[0].rstrip(".")
        first = FIRST[section].split()
        more = len(fields(cls)) - len(first)
        lines.append(f"{section}: {about.partition(':')[0]}")
        lines.append(f"  {', '.join(first)}" + (f", and {more} more" if more else ""))
    last = "`phi3-jax train --help SECTION` explains the keys of one, `--help-all` of all."
    return "\n".join([*lines, "", last])


def _help_parser(sections: Collection[str]) -> jsonargparse.ArgumentParser:
    """Every key with its type, its default and what it does, which a parser that keeps text does not know."""
    parser = jsonargparse.ArgumentParser(prog="phi3-jax train", usage=USAGE, description=DESCRIPTION)
    parser.add_argument(
        "--config", metavar="FILE", help="YAML file with these sections, or a recipe's name (phi3-jax recipes)."
    )
    parser.add_argument("--print-config", action="store_true", help=PRINT_CONFIG)
    add_saying_arguments(parser)
    add_sections(parser, {name: SECTIONS[name] for name in sections})
    return parser
