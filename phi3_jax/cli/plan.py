"""`phi3-jax plan`: whether a run fits on a device, and what it needs there."""

import json
import sys
from collections.abc import Sequence

from phi3_jax.cli.parser import Parser
from phi3_jax.system.errors import InputError
from phi3_jax.system.text import printable

DESCRIPTION = """Whether a run fits on a topology, what it needs and how long a step takes; nothing is run, and of the
model only config.json is read. Takes the options of phi3-jax train, --config FILE and --section.key value, beside
these."""


def run(argv: Sequence[str]) -> None:
    parser = Parser("plan", DESCRIPTION)
    parser.add_argument(
        "--topology",
        metavar="NAME",
        help="cpu, gpu:h100 (h200, a100, a100-40gb, l40s, l4), gpu:h100:8, or a TPU slice: v5e:2x2, v6e:4x4, v5p:2x2x4",
    )
    parser.add_argument("--estimate", action="store_true", help="estimate the memory, compile nothing")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    own, rest = _split(argv)
    arguments = parser.parse(own)
    if arguments.topology is None:
        raise InputError("--topology is not given; give one such as cpu, gpu:h100 or v5e:2x2")

    from phi3_jax.cli.train import read_arguments
    from phi3_jax.config.run import parse_run_config

    config, notices = parse_run_config(read_arguments(rest)[0])
    for notice in notices:
        print(printable(notice), file=sys.stderr)

    from phi3_jax.performance.plan import make_plan, print_plan

    plan = make_plan(config, arguments.topology, estimate=arguments.estimate)
    if arguments.json:
        print(json.dumps(plan.to_dict()))
    else:
        print_plan(plan)


def _split(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """The tokens of this command's own options, and those that spell out the run."""
    own: list[str] = []
    rest: list[str] = []
    tokens = iter(argv)
    for token in tokens:
        name, equals, _ = token.partition("=")
        is_of_run = name == "--config" or (name.startswith("--") and "." in name)
        target = rest if is_of_run else own
        target.append(token)
        if (is_of_run or name == "--topology") and not equals:
            target += [value for value in (next(tokens, None),) if value is not None]
    return own, rest
