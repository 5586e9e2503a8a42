"""`phi3-jax train`: a YAML file, values on the command line over it, and the run."""

import sys
from collections.abc import Sequence

import jsonargparse

from phi3_jax.cli.run_options import RunParser, make_run, read_run
from phi3_jax.config.parse import add_sections
from phi3_jax.config.run import SECTIONS

USAGE = "phi3-jax train [--config FILE] [--section.key value …]"
DESCRIPTION = """Fine-tune a model on chats. Every key of a configuration file can be given, or given anew, on the
command line. The names of transformers' TrainingArguments, TRL's SFTConfig and PEFT's LoraConfig are understood."""
PRINT_CONFIG = "Print the whole configuration and stop."


def run(argv: Sequence[str]) -> None:
    """Runs `phi3-jax train`."""
    if "-h" in argv or "--help" in argv:
        _help_parser().print_help()
        return
    parser = RunParser("train", DESCRIPTION)
    parser.add_argument("--print-config", action="store_true", help=PRINT_CONFIG)
    options = parser.parse(argv)
    config = make_run(read_run(options), sys.stderr if options.print_config else sys.stdout)
    if options.print_config:
        print(config.to_yaml(), end="")
        return
    config.data.require_train()

    from phi3_jax.parallel.distributed import initialize
    from phi3_jax.training.loop import train

    initialize()
    train(config)


def _help_parser() -> jsonargparse.ArgumentParser:
    """Every key with its type, its default and what it does, which a parser that keeps text does not know."""
    parser = jsonargparse.ArgumentParser(prog="phi3-jax train", usage=USAGE, description=DESCRIPTION)
    parser.add_argument("--config", metavar="FILE", help="YAML file with these sections; may be given more than once.")
    parser.add_argument("--print-config", action="store_true", help=PRINT_CONFIG)
    add_sections(parser, SECTIONS)
    return parser
