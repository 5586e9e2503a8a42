"""`phi3-jax info`: what a checkpoint, an adapter or a run holds, without loading its weights."""

import json
from collections.abc import Sequence

from phi3_jax.cli.parser import Parser


def run(argv: Sequence[str]) -> None:
    parser = Parser("info", "What a checkpoint, an adapter or a run holds; weights are not loaded.")
    parser.add_argument("path", metavar="PATH", help="folder of a checkpoint, an adapter or a run, or a hub id")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--revision", metavar="NAME", help="branch, tag or commit on the hub")
    parser.add_argument("--local-files-only", action="store_true", help="never ask the network")
    arguments = parser.parse(argv)

    from phi3_jax.hf.info import checkpoint_info, print_info

    info = checkpoint_info(arguments.path, revision=arguments.revision, local_files_only=arguments.local_files_only)
    if arguments.json:
        print(json.dumps(info, indent=2))
    else:
        print_info(info)
