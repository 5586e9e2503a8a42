"""`phi3-jax recipes`: the configurations that the package brings along."""

from collections.abc import Sequence

from phi3_jax.cli.parser import Parser
from phi3_jax.config.recipes import recipe, recipe_names, recipe_text

DESCRIPTION = """The recipes that --config NAME takes, with the model, the method and the device that each fits on; with
NAME that recipe's file, to copy: phi3-jax recipes NAME > my.yaml."""


def run(argv: Sequence[str]) -> None:
    """Runs `phi3-jax recipes`."""
    name = make_parser().parse(argv).name
    if name is not None:
        print(recipe_text(name), end="")
        return
    rows = [(found.name, found.model, found.method, found.needs, found.title) for found in map(recipe, recipe_names())]
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    for row in rows:
        print("  ".join([*(f"{text:<{width}}" for text, width in zip(row, widths, strict=False)), row[4]]).rstrip())
    print("\nphi3-jax train --config NAME --data.train chats.jsonl trains by one; phi3-jax recipes NAME prints it")


def make_parser() -> Parser:
    """The options of `phi3-jax recipes`."""
    parser = Parser("recipes", DESCRIPTION)
    parser.add_argument("name", nargs="?", metavar="NAME", help="print this one")
    return parser
