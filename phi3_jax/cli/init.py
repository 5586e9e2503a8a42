"""`phi3-jax init`: a configuration for a model, a file of rows and a device, from five answers."""

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from phi3_jax.cli.parser import Parser, add_hub_arguments, hub_of
from phi3_jax.cli.row_options import columns
from phi3_jax.config.sections import DataSection
from phi3_jax.demo import demo_path
from phi3_jax.parallel.hardware import GB, HARDWARE
from phi3_jax.system.errors import InputError
from phi3_jax.system.reading import local_path
from phi3_jax.system.text import one_line, printable

if TYPE_CHECKING:
    from phi3_jax.data.look import RowsLook
    from phi3_jax.performance.propose import Proposal

Read = TypeVar("Read")

DESCRIPTION = """Writes a commented YAML file that trains a model on your rows and fits on your device. In a terminal it
asks for what is not given as an option; elsewhere, and with --defaults, it takes the defaults. Of the model its
config.json and tokenizer are read, no weights."""

DEMO = "demo"
MICROSOFTS = "microsoft/Phi-3-mini-4k-instruct"
ROWS = (".jsonl", ".json", ".csv", ".parquet", ".arrow")
HELP = {
    "device": "here, or a name that phi3-jax plan takes: gpu:rtx4090, gpu:24GB, v5litepod-8 … (default: here)",
    "model": f"checkpoint folder or hub id; demo is the built-in one (default: {MICROSOFTS}, on a CPU demo)",
    "data": "file, folder or hub dataset to train on (default: the one data file in this folder)",
    "method": "auto, lora, qlora or full; auto takes QLoRA where LoRA does not fit (default: auto)",
    "output": "YAML file to write; the run itself goes to out/ under its name (default: run.yaml)",
}
QUESTIONS = {
    "device": "Which device will train (here, gpu:rtx4090, gpu:24GB, v5litepod-8 …)?",
    "model": "Which model (folder, hub id, or demo for the built-in one)?",
    "data": "Which file, folder or hub dataset of rows?",
    "method": "What is to be trained (auto, lora, qlora, full)?",
    "output": "Which file is to be written?",
}


def run(argv: Sequence[str]) -> None:
    """Runs `phi3-jax init`."""
    arguments = make_parser().parse(argv)

    from phi3_jax.config.commented import commented_yaml
    from phi3_jax.data.look import look_at
    from phi3_jax.hf.checkpoint import Checkpoint
    from phi3_jax.hf.hub import SMALL_FILES
    from phi3_jax.performance.propose import method_of, propose
    from phi3_jax.performance.topology import parse_topology
    from phi3_jax.system.files import storing, write_text

    def opened(name: str) -> Checkpoint:
        checkpoint = Checkpoint.open(_model(name), hub_of(arguments), patterns=SMALL_FILES)
        _ = checkpoint.config, checkpoint.tokenizer  # what is wrong with them is said now
        return checkpoint

    if arguments.output is not None:
        _free(arguments.output, arguments.overwrite)  # before anything that takes a while
    device, topology = _answer(arguments, "device", lambda: "here", parse_topology)
    default = DEMO if topology.platform == "cpu" else MICROSOFTS
    _, checkpoint = _answer(arguments, "model", lambda: default, opened)
    section = DataSection(columns=arguments.columns, skip_invalid=arguments.skip_invalid)
    data, rows = _answer(
        arguments, "data", _data_here, lambda name: look_at(replace(section, train=name), checkpoint.tokenizer)
    )
    _, method = _answer(arguments, "method", lambda: "auto", method_of)
    _, output = _answer(arguments, "output", lambda: "run.yaml", lambda name: _free(name, arguments.overwrite))

    found = propose(
        checkpoint,
        rows,
        device,
        data=replace(section, train=data),
        method=method,
        output_dir=f"out/{output.stem}",
    )
    facts = [one_line(line) for line in _facts(found, rows, data, output)]
    title = [f"Written by phi3-jax init: phi3-jax train --config {one_line(str(output))}", *facts]
    with storing(output):
        output.parent.mkdir(parents=True, exist_ok=True)
    write_text(output, commented_yaml(found.settings, found.why, title) + "\n")
    for line in facts:
        print(line)
    print(f"wrote {one_line(str(output))}; what next:")
    print(f"  phi3-jax data --config {one_line(str(output))}     # what will be trained on, targets marked")
    print(f"  phi3-jax train --config {one_line(str(output))}")


def make_parser() -> Parser:
    """The options of `phi3-jax init`."""
    parser = Parser("init", DESCRIPTION)
    for name, text in HELP.items():
        parser.add_argument(f"--{name}", metavar="NAME" if name in ("device", "method") else "PATH", help=text)
    parser.add_argument(
        "--columns",
        metavar="PART=COLUMN,...",
        type=columns,
        help="data.columns: which column plays which part, such as prompt=question,completion=answer",
    )
    parser.add_argument("--skip-invalid", action="store_true", help="data.skip_invalid: leave out rows with any fault")
    parser.add_argument("--defaults", action="store_true", help="ask nothing")
    parser.add_argument("--overwrite", action="store_true", help="replace the file that is there")
    add_hub_arguments(parser)
    return parser


def _answer(
    arguments: argparse.Namespace, name: str, default: Callable[[], str], read: Callable[[str], Read]
) -> tuple[str, Read]:
    """An answer as it was given and what it means: an option, what somebody types, or the default.

    Raises:
        InputError: It cannot be used; what is typed is asked for again instead.
    """
    given = getattr(arguments, name)
    if given is not None:
        return given, read(given)
    if arguments.defaults or not sys.stdin.isatty():
        return default(), read(default())
    try:
        suggested = default()
    except InputError:
        suggested = ""
    while True:
        try:
            typed = input(f"{QUESTIONS[name]} {f'[{printable(suggested)}] ' if suggested else ''}").strip() or suggested
        except EOFError as error:
            raise InputError(f"the input ended before --{name} was answered") from error
        try:
            if typed:
                return typed, read(typed)
        except InputError as error:
            print(f"  {one_line(str(error))}")


def _model(name: str) -> str:
    """Where the model is; `demo` is the built-in one, unless there is a folder of that name."""
    return str(demo_path("base")) if name == DEMO and not Path(name).exists() else name


def _data_here() -> str:
    """The one file of rows in this folder. Raises `InputError` where there is none, or several."""
    files = sorted(file.name for file in Path().iterdir() if file.suffix in ROWS and file.is_file())
    if len(files) != 1:
        found = f"which of {', '.join(files[:5])}" if files else "no file of rows is in this folder"
        raise InputError(f"--data is not given, and {found}; name a file, a folder or a hub dataset to train on")
    return files[0]


def _free(name: str, overwrite: bool) -> Path:
    """The file to write. Raises `InputError` where it may not be."""
    path = local_path(name, "give a YAML file to write")
    if path.suffix not in (".yaml", ".yml"):
        raise InputError(f"--output {name} is no YAML file; give one such as run.yaml")
    if path.exists() and not overwrite:
        raise InputError(f"--output {name} is there already; give another, or --overwrite")
    return path


def _facts(found: "Proposal", rows: "RowsLook", data: str, output: Path) -> Iterator[str]:
    """What was seen, and what is planned."""
    from phi3_jax.data.rows import MOST_NAMED

    plan, figures = found.plan, rows.stats.length_figures or {}
    formats = ", ".join(f"{count:,} as {name}" for name, count in rows.stats.formats.items())
    looked = f", of which {len(rows.lengths):,} were looked at" if len(rows.lengths) < rows.rows else ""
    yield f"Rows: {data}: {rows.rows:,}{looked}; columns {', '.join(rows.columns)}; read {formats}."
    if rows.stats.left_out:
        (where, why), number = rows.stats.left_out[0], len(rows.stats.left_out)
        yield f"Left out: {number:,}{' or more' if number == MOST_NAMED else ''}, the first {where}: {why}."
    yield (
        f"Tokens of a row: {figures['min']:,} to {figures['max']:,}, half of them up to {figures['median']:,}; "
        f"{rows.targets.mean():,.0f} are trained on, on average."
    )
    topology = plan.topology
    kind = topology.device_kind if topology.device_kind in HARDWARE else topology.platform.upper()
    devices = f"{topology.devices} x " if topology.devices > 1 and topology.platform != "cpu" else ""
    yield f"Device: {topology.name}: {devices}{kind} with {topology.hbm / GB:.1f} GB."
    yield (
        f"Memory: {plan.memory.total / GB:.2f} GB{' of each' if devices else ''}, by phi3-jax plan --config {output} "
        f"--topology {topology.name}; {plan.trainable_parameters:,} parameters train."
    )
    time = "" if plan.time.seconds is None else f", {_span(*(found.steps * seconds for seconds in plan.time.seconds))}"
    yield f"Time: {found.steps:,} steps{time}{' with full rows, beside loading and compiling' if time else ''}."
    if found.needs_share and not any("MEM_FRACTION" in note for note in plan.notes):
        yield "Set XLA_PYTHON_CLIENT_MEM_FRACTION=0.95: JAX takes 75% of a GPU's memory unless told otherwise."
    if Path(str(found.settings["model.name_or_path"])) == demo_path("base"):
        yield f"The built-in model shows the way: it learns a form, not facts. --model {MICROSOFTS} is a real one."
    yield from plan.notes


def _span(least: float, most: float) -> str:
    """Two lengths of time, of seconds, in the unit that suits the longer one."""
    size, unit = (3600, "hours") if most >= 3600 else (60, "minutes") if most >= 60 else (1, "seconds")
    return (
        " to ".join(f"{seconds / size:,.{0 if seconds >= 10 * size else 1}f}" for seconds in (least, most)) + f" {unit}"
    )
