"""`phi3-jax evaluate`: a base, its adapters and merged checkpoints on the same rows."""

import json
import sys
from collections.abc import Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, get_args

from phi3_jax.cli.generation import add_generation_arguments, given_settings
from phi3_jax.cli.parser import Parser, add_base_arguments, positive
from phi3_jax.cli.row_options import add_row_arguments, columns, with_row_options
from phi3_jax.config.sections import DataSection, ParallelSection

if TYPE_CHECKING:
    from phi3_jax.evaluate.results import Results

METRICS = """metrics: loss (with perplexity and token accuracy), rouge, bleu, chrf, exact_match, normalized_match,
accuracy, f1, gsm8k, tool_call, regex=PATTERN, json_schema=FILE; all but loss are of the model's answer to what comes
before the last assistant turn. regex and json_schema take the rest of their text: give them last, or a --metrics of
their own."""
# Settings that have no option here: answers are compared one by one, and --max-length is a row's.
WITHOUT = ("num_return_sequences", "max_length")
ANSWERS = """what is not given is as generation_config.json says, but --max-new-tokens, which is 128, and --do-sample:
without it the likeliest tokens are taken, and --temperature, --top-k, --top-p and --min-p do nothing"""


def run(argv: Sequence[str]) -> None:
    """Runs `phi3-jax evaluate`."""
    arguments = make_parser().parse(argv)
    data = DataSection(
        train=arguments.data,
        split=arguments.split,
        format=arguments.format,
        columns=arguments.columns,
        loss_on=arguments.loss_on,
        max_length=arguments.longest_row,
        max_rows=arguments.max_rows,
        packing=False,
        shuffle=False,
    )
    data = with_row_options(data, arguments)
    parallel = ParallelSection(**{f.name: getattr(arguments, f"parallel.{f.name}") for f in fields(ParallelSection)})
    # One model and no more said: its figures alone.
    is_plain = not (arguments.metrics or arguments.merged or arguments.output) and len(arguments.adapter) < 2

    from phi3_jax.evaluate import evaluate
    from phi3_jax.evaluate.metrics import split_metrics
    from phi3_jax.parallel.distributed import initialize, is_main
    from phi3_jax.parallel.mesh import device_line
    from phi3_jax.system.telling import tell_first

    specs = [spec for text in arguments.metrics or ["loss"] for spec in split_metrics(text)]
    initialize()
    tell_first(device_line)
    results = evaluate(
        arguments.model,
        data,
        adapters=arguments.adapter,
        merged=arguments.merged,
        metrics=specs,
        output_dir=arguments.output,
        include_base=not (is_plain and arguments.adapter),
        dtype=arguments.dtype,
        quantization=arguments.quantization,
        revision=arguments.revision,
        cache_dir=arguments.cache_dir,
        local_files_only=arguments.local_files_only,
        parallel=parallel,
        batch_size=arguments.batch_size,
        turns=arguments.turns,
        **given_settings(arguments, without=WITHOUT),
    )
    if not is_main():
        return
    if is_plain:
        _print_plain(results, arguments.json)
    elif arguments.json:
        print(json.dumps(results.to_dict()))
    else:
        _print_table(results, arguments.output)


def _print_plain(results: "Results", as_json: bool) -> None:
    """The three figures of the one model."""
    from phi3_jax.report.forms import figure_words, form_of

    (figures,) = results.models.values()
    values = {f"eval_{name}": found.value for name, found in figures.items()}
    if as_json:
        print(json.dumps({**values, **results.data}))
        return
    for name, value in values.items():
        print(f"{figure_words(name):<16}{form_of(name).write(value)}")
    print(f"over {results.data['target_tokens']:,} target tokens of {results.data['rows']:,} rows")


def _print_table(results: "Results", output_dir: str | None) -> None:
    from rich.console import Console

    # As wide as it has to be where nobody's terminal limits it.
    console = Console() if sys.stdout.isatty() else Console(width=160)
    notices = results.data["notices"]
    for notice in notices if isinstance(notices, list | tuple) else ():
        console.print(f"note: {notice}", markup=False, highlight=False)
    console.print(results.table())
    if output_dir is not None:
        print(f"wrote {output_dir}/results.json, {output_dir}/report.html and {output_dir}/predictions")


def make_parser() -> Parser:
    """The options of `phi3-jax evaluate`."""
    choices = {field.name: get_args(field.type) for field in fields(DataSection)}
    parser = Parser("evaluate", "Measure a model, its adapters and merged checkpoints on chats.")
    parser.epilog = METRICS
    add_base_arguments(parser)
    parser.add_argument(
        "--adapter",
        nargs="+",
        action="extend",
        default=[],
        metavar="[NAME=]PATH",
        help="adapter folders or hub ids (PEFT), with names of your own if you like",
    )
    parser.add_argument(
        "--merged", nargs="+", action="extend", default=[], metavar="[NAME=]DIR", help="whole checkpoints to compare"
    )
    parser.add_argument("--data", required=True, metavar="PATH", help="file, folder or hub dataset id")
    parser.add_argument(
        "--metrics", action="append", metavar="NAME,...", help="what to measure (default: loss); see below"
    )
    parser.add_argument(
        "--output",
        metavar="DIR",
        help="folder for predictions, results.json and report.html; what was interrupted there goes on",
    )
    parser.add_argument("--split", default="train", help="split of a hub dataset (default: train)")
    parser.add_argument("--format", choices=choices["format"], default="auto", help="shape of the rows (default: auto)")
    parser.add_argument(
        "--columns",
        metavar="PART=COLUMN,...",
        type=columns,
        help="which column plays which part, such as prompt=question,completion=answer",
    )
    parser.add_argument(
        "--loss-on", choices=choices["loss_on"], default="assistant", help="tokens that count (default: assistant)"
    )
    parser.add_argument(
        "--turns",
        choices=["last", "all"],
        help="assistant turns that are answered: the last of a row, or all, each as a row of its own (default: all "
        "with tool_call, else last)",
    )
    # Not the setting of that name of how to answer, which there is no option for here.
    parser.add_argument(
        "--max-length",
        dest="longest_row",
        type=positive,
        default=2048,
        metavar="N",
        help="longest row (default: 2048)",
    )
    parser.add_argument("--max-rows", type=positive, metavar="N", help="only the first so many rows")
    add_row_arguments(parser)
    parser.add_argument(
        "--batch-size", type=positive, default=4, metavar="N", help="rows of a device in a forward pass (default: 4)"
    )
    add_generation_arguments(parser, ANSWERS, without=WITHOUT)
    for field in fields(ParallelSection):
        parser.add_argument(
            f"--parallel.{field.name}", type=int, default=1, metavar="N", help="devices along this axis, as in training"
        )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser
