"""`phi3-jax info`: what a checkpoint, an adapter or a run holds, without loading its weights."""

import json
from collections.abc import Sequence

from phi3_jax.cli.parser import Parser, add_hub_arguments


def run(argv: Sequence[str]) -> None:
    """Runs `phi3-jax info`."""
    arguments = make_parser().parse(argv)

    from phi3_jax.hf.info import checkpoint_info, print_info

    info = checkpoint_info(
        arguments.path,
        revision=arguments.revision,
        cache_dir=arguments.cache_dir,
        local_files_only=arguments.local_files_only,
    )
    if arguments.json:
        print(json.dumps(info, indent=2))
    else:
        print_info(info)


def make_parser() -> Parser:
    """The options of `phi3-jax info`."""
    parser = Parser("info", "What a checkpoint, an adapter or a run holds; weights are not loaded.")
    parser.add_argument("path", metavar="PATH", help="folder of a checkpoint, an adapter or a run, or a hub id")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    add_hub_arguments(parser, revision="branch, tag or commit on the hub")
    return parser
