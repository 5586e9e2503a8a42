"""What compilers say of the run's own step, for devices that need not be here: the table of docs/benchmarks.md.

    python scripts/benchmarks/compiled.py --models ../shared/testdata/models            # all rows
    python scripts/benchmarks/compiled.py mini-v5e qlora-v5e --json rows.json --keep hlo

Each row compiles in a process of its own, in one to three minutes on two cores; libtpu is needed for the TPUs'
(`pip install 'phi3_jax[tpu]'`). Times are XLA's estimates, no measurement.
"""

import argparse
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

from phi3_jax.cli.run_options import RunParser, make_run, read_run
from phi3_jax.config.model import Phi3Config
from phi3_jax.config.run import RunConfig
from phi3_jax.hf.files import CONFIG
from phi3_jax.parallel.hardware import GiB
from phi3_jax.peft.continued import open_run_base
from phi3_jax.performance.compile import Compiled, compile_elsewhere
from phi3_jax.performance.cost import KINDS
from phi3_jax.performance.plan import as_stored
from phi3_jax.performance.step_time import step_time
from phi3_jax.performance.topology import abstract_mesh, parse_topology
from phi3_jax.system.errors import InputError
from phi3_jax.training.abstract import abstract_step

MINI, MINI_35, PHI_4, PHI_4_MINI = (
    "microsoft/Phi-3-mini-4k-instruct",
    "microsoft/Phi-3.5-mini-instruct",
    "microsoft/phi-4",
    "microsoft/Phi-4-mini-instruct",
)


@dataclass(frozen=True)
class Row:
    """A run and what it is compiled for.

    Attributes:
        name: As the command line has it.
        model: Hub id.
        recipe: Whose settings it has.
        topology: As `plan` takes it.
        settings: What is set beside them.
    """

    name: str
    model: str
    recipe: str
    topology: str
    settings: dict[str, object] = field(default_factory=dict)

    def run(self, models: Path | None) -> tuple[RunConfig, Phi3Config]:
        """The run and the model's configuration, which is downloaded where it is not in `models`."""
        folder = None if models is None else models / self.model.partition("/")[2].lower()
        where = str(folder) if folder is not None and folder.is_dir() else self.model
        options = [
            text
            for key, value in {"model.name_or_path": where, **self.settings}.items()
            for text in (f"--{key}", json.dumps(value) if isinstance(value, bool) else str(value))
        ]
        parser = RunParser("compiled", __doc__ or "")
        run = make_run(read_run(parser.parse(["--config", self.recipe, *options])))
        checkpoint = open_run_base(run, patterns=(CONFIG,))
        return as_stored(run, checkpoint), checkpoint.config


_ONE_ROW: dict[str, object] = {
    "training.per_device_train_batch_size": 1,
    "training.gradient_accumulation_steps": 1,
    "peft.lora_dropout": 0,
}
_LONG = {**_ONE_ROW, "data.max_length": 131072, "training.remat_policy": "offload"}
_FOUR_ROWS = {**_ONE_ROW, "training.per_device_train_batch_size": 4}
ROWS = (
    Row("mini-v5e", MINI, "phi3_mini_4k_lora", "v5e:1x1"),
    Row("mini-v6e-8", MINI, "phi3_mini_4k_lora", "v6e:2x4", {"peft.lora_dropout": 0, "parallel.fsdp": -1}),
    Row("mini-v6e-8-data", MINI, "phi3_mini_4k_lora", "v6e:2x4", {"peft.lora_dropout": 0, "parallel.data": -1}),
    Row("qlora-v5e", MINI, "phi3_mini_4k_qlora", "v5e:1x1", {"peft.lora_dropout": 0}),
    Row("phi4-mini-v6e", PHI_4_MINI, "phi4_mini_lora", "v6e:1x1", {**_FOUR_ROWS, "data.max_length": 2048}),
    Row("phi4-v5e-16", PHI_4, "phi3_mini_4k_lora", "v5e:4x4", {**_ONE_ROW, "parallel.fsdp": -1}),
    Row("mini-v5e-256", MINI, "phi3_mini_4k_lora", "v5e:16x16", {**_ONE_ROW, "parallel.data": 16, "parallel.fsdp": 16}),
    Row("long-nf4-v5e", MINI_35, "phi35_mini_lora", "v5e:1x1", {**_LONG, "model.quantization": "nf4"}),
    Row("long-nf4-v6e", MINI_35, "phi35_mini_lora", "v6e:1x1", {**_LONG, "model.quantization": "nf4"}),
    Row("long-v6e", MINI_35, "phi35_mini_lora", "v6e:1x1", _LONG),
)


def main() -> None:
    """Compiles the rows that are asked for, and prints a table of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help=f"rows: {', '.join(row.name for row in ROWS)}; default: all")
    parser.add_argument("--models", type=Path, help="folder with the models' config.json, by name (default: the hub)")
    parser.add_argument("--json", type=Path, help="file for the figures, written anew after each row")
    parser.add_argument("--keep", type=Path, help="folder for the compiled programs' texts")
    options = parser.parse_args()
    rows = {row.name: row for row in ROWS}
    if unknown := [name for name in options.names if name not in rows]:
        parser.error(f"there is no row {unknown[0]!r}; give some of {', '.join(rows)}")
    if options.keep is not None:
        options.keep.mkdir(parents=True, exist_ok=True)
    done: dict[str, object] = {}
    print(f"| row | devices | peak GiB | est ms | at least ms | {' | '.join(KINDS)} | waited for | GB | compiled |")
    print("|" + "---|" * (len(KINDS) + 8))
    for row in [rows[name] for name in options.names] or ROWS:
        keep = None if options.keep is None else options.keep / f"{row.name}.hlo.gz"
        run, config = row.run(options.models)
        try:
            compiled = compile_elsewhere(run, config, row.topology, keep=keep)
        except (InputError, RuntimeError) as error:
            print(f"| {row.name} | {row.topology} | {error} |", flush=True)
            continue
        print("| " + " | ".join(cells(row, compiled)) + " |", flush=True)
        done[row.name] = {**asdict(row), **asdict(compiled), "plan": plan_seconds(row, run, config)}
        if options.json is not None:
            options.json.write_text(json.dumps(done, indent=1))


def cells(row: Row, compiled: Compiled) -> Iterator[str]:
    """The row of the table."""
    yield row.name
    yield row.topology
    yield f"{compiled.bytes_per_device / GiB:.2f}" + ("" if compiled.fits else " (too much)")
    cost = compiled.cost
    if cost is None:
        yield from ["-"] * (len(KINDS) + 4)
    else:
        yield f"{cost.seconds * 1e3:,.0f}"
        yield f"{cost.bound * 1e3:,.0f}"
        yield from (f"{cost.work[kind].seconds * 1e3:,.0f}" if kind in cost.work else "-" for kind in KINDS)
        waited = ", ".join(f"{number} {kind}" for kind, number in cost.waited_for.items())
        yield waited or "nothing"
        yield f"{cost.bytes / 1e9:,.0f}"
    yield f"{compiled.seconds:.0f} s"


def plan_seconds(row: Row, run: RunConfig, config: Phi3Config) -> tuple[float, float] | None:
    """What `plan` says of the step's time: the least and the most."""
    topology = parse_topology(row.topology)
    mesh = abstract_mesh(run, topology)
    trainable = abstract_step(run, config, mesh).table.trainable
    return step_time(run, config, dict(mesh.shape), trainable, topology).seconds


if __name__ == "__main__":
    main()
