"""`phi3-jax benchmark`: which of the benchmarks."""

from collections.abc import Sequence

from phi3_jax.config.names import did_you_mean
from phi3_jax.system.errors import InputError

USAGE = """\
usage: phi3-jax benchmark train|generate [options]

train measures the train step with random weights, generate how fast a model decodes;
`phi3-jax benchmark train --help` and `phi3-jax benchmark generate --help` list the options.
"""


def run(argv: Sequence[str]) -> None:
    """Runs `phi3-jax benchmark`."""
    from phi3_jax.cli import benchmark_generate, benchmark_train

    benchmarks = {"train": benchmark_train.run, "generate": benchmark_generate.run}
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE, end="")
        return
    name, *rest = argv
    if name not in benchmarks:
        near = did_you_mean(name, benchmarks) or "; there are train and generate"
        raise InputError(f"unknown benchmark {name}{near}")
    benchmarks[name](rest)
