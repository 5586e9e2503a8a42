"""`phi3-jax plan`: whether a run fits on a device, and what it needs there."""

import json
from collections.abc import Sequence

from phi3_jax.cli.run_options import RunParser, make_run, read_run
from phi3_jax.system.errors import InputError

DESCRIPTION = """Whether a run fits on a topology, what it needs and how long a step takes; nothing is run, and of the
model only config.json is read. Takes the options of phi3-jax train, --config FILE and --section.key value, beside
these."""


def run(argv: Sequence[str]) -> None:
    """Runs `phi3-jax plan`."""
    options = make_parser().parse(argv)
    if options.topology is None:
        raise InputError("--topology is not given; give one such as here, gpu:rtx4090, gpu:24GB or v5litepod-8")
    config = make_run(read_run(options))

    from phi3_jax.performance.plan import make_plan, print_plan

    plan = make_plan(config, options.topology, estimate=options.estimate)
    if options.json:
        print(json.dumps(plan.to_dict()))
    else:
        print_plan(plan)


def make_parser() -> RunParser:
    """The options of `phi3-jax plan`."""
    parser = RunParser("plan", DESCRIPTION)
    parser.add_argument(
        "--topology",
        metavar="NAME",
        help="here, cpu, gpu:h100 (rtx4090, l4, t4 …), gpu:h100:8, gpu:24GB, or a TPU slice: v5e:2x2, v5litepod-8; two "
        "slices: v5e:4x4:2",
    )
    parser.add_argument("--estimate", action="store_true", help="estimate the memory, compile nothing")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser
