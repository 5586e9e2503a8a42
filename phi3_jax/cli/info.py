"""`phi3-jax info`: what a checkpoint or an adapter holds, without loading its weights, and how a run went."""

import json
from collections.abc import Sequence

from phi3_jax.cli.parser import Parser, add_hub_arguments


def run(argv: Sequence[str]) -> None:
    """Runs `phi3-jax info`."""
    arguments = make_parser().parse(argv)

    from phi3_jax.hf.info import checkpoint_info, print_info
    from phi3_jax.system.reading import local_path
    from phi3_jax.training.run_info import is_run, print_run, run_info

    folder = local_path(arguments.path)
    run = run_info(folder) if is_run(folder) else None
    if run is not None and not arguments.json:
        print_run(arguments.path, run)
        return
    if run is not None and not any(folder.glob("*/adapter_config.json")):
        print(json.dumps({"path": arguments.path, "run": run}, indent=2))
        return
    info = checkpoint_info(
        arguments.path,
        revision=arguments.revision,
        cache_dir=arguments.cache_dir,
        local_files_only=arguments.local_files_only,
    )
    if arguments.json:
        print(json.dumps(info if run is None else {**info, "run": run}, indent=2))
    else:
        print_info(info)


def make_parser() -> Parser:
    """The options of `phi3-jax info`."""
    parser = Parser("info", "What a checkpoint or an adapter holds, and how a run went; weights are not loaded.")
    parser.add_argument("path", metavar="PATH", help="folder of a checkpoint, an adapter or a run, or a hub id")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    add_hub_arguments(parser, revision="branch, tag or commit on the hub")
    return parser
