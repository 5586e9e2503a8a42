"""`phi3-jax data`: what a run will train on, before any weight is loaded."""

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, NoReturn

import jsonargparse

from phi3_jax.cli.parser import add_hub_arguments
from phi3_jax.cli.run_options import RunParser, make_run, read_run
from phi3_jax.config.parse import merged
from phi3_jax.config.run import RunConfig
from phi3_jax.system.errors import InputError

if TYPE_CHECKING:
    from phi3_jax.data import TokenizedRows
    from phi3_jax.data.tokenizer import Tokenizer

DESCRIPTION = """What will be trained on: rows, formats, tokens and targets of data files, as training would read them.
Of the model only the tokenizer and config.json are read."""
EPILOG = """Every --data.KEY of phi3-jax train holds here too, such as --data.max_length 512, and so does --config FILE
with other --section.key value over it; without DATA its data.train and data.eval are shown. Name all DATA in one
place, before or after the options."""


def run(argv: Sequence[str]) -> None:
    """Runs `phi3-jax data`."""
    options = make_parser().parse(argv)
    config = _config(options)

    from phi3_jax.data.vocabulary import check_vocabulary
    from phi3_jax.hf.files import CONFIG
    from phi3_jax.hf.hub import SMALL_FILES
    from phi3_jax.peft.continued import open_run_base
    from phi3_jax.training.checks import check_length

    checkpoint = open_run_base(config, patterns=SMALL_FILES)
    tokenizer = checkpoint.tokenizer
    sets, note = _prepared(config, options.data_files, tokenizer)
    if (checkpoint.folder / CONFIG).is_file():  # an adapter's folder has a tokenizer alone
        check_vocabulary(list(sets.values()), tokenizer, checkpoint.config.vocab_size)
        check_length(max(int(rows.lengths.max()) for rows in sets.values()), checkpoint.config)
    if options.json:
        described = [_described(name, rows, tokenizer, options.show) for name, rows in sets.items()]
        settings = config.to_dict()["data"]
        print(json.dumps({"model": config.model.name_or_path, "settings": settings, "sets": described, "note": note}))
        return

    from phi3_jax.cli.data_view import DataView

    view = DataView(tokenizer, config.data)
    for name, rows in sets.items():
        is_trained = options.data_files or name == "train"
        step_rows = _step_rows(config) if is_trained else None
        drops = config.training.dataloader_drop_last
        multiple = step_rows // config.training.gradient_accumulation_steps if step_rows and drops else 1
        view.print(name, rows, show=options.show, step_rows=step_rows, multiple=multiple)
    if note is not None:
        view.note(note)


class _DataParser(RunParser):
    def error(self, message: str, *_: object) -> NoReturn:
        if message.startswith("unrecognized arguments"):
            raise InputError(f"{message}; name all files in one place, before or after the options")
        super().error(message)


def make_parser() -> RunParser:
    """The options of `phi3-jax data`."""
    parser = _DataParser("data", DESCRIPTION, EPILOG)
    parser.add_argument(
        "data_files", nargs="*", metavar="DATA", help="files, folders or hub dataset ids, each shown by itself"
    )
    parser.add_argument("--model", dest="checkpoint", metavar="PATH", help="checkpoint folder or hub id")
    parser.add_argument(
        "--show", type=_count, default=1, metavar="N", help="show the first N rows of each, targets marked (default: 1)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    add_hub_arguments(parser)
    return parser


def _count(value: str | int) -> int:
    """An option's whole number of at least 0."""
    if not str(value).isdecimal():
        raise argparse.ArgumentTypeError(f"{value} is no whole number of at least 0")
    return int(value)


def _config(options: jsonargparse.Namespace) -> RunConfig:
    """The run whose rows are meant."""
    names = {
        "name_or_path": options.checkpoint,
        "revision": options.revision,
        "cache_dir": options.cache_dir,
        "local_files_only": options.local_files_only or None,
    }
    raw = merged(read_run(options), {"model": {name: value for name, value in names.items() if value is not None}})
    model = raw.get("model")
    if not isinstance(model, Mapping) or not model.get("name_or_path"):
        raise InputError("--model is not given; name the checkpoint whose tokenizer and chat template will be used")
    _check_named_once(options)
    config = make_run(raw)
    if config.data.train is None and not options.data_files:
        raise InputError("no data is named; give files, folders or hub ids, or a --config whose data.train is set")
    return config


def _check_named_once(options: jsonargparse.Namespace) -> None:
    """Raises `InputError` for what says otherwise than DATA which rows are meant; files of --config may."""
    if options.data_files and "data" in options:
        for key in ("train", "eval", "eval_split", "eval_fraction"):
            if key in options.data:
                raise InputError(f"--data.{key} is given beside {options.data_files[0]}; leave one of them out")


def _prepared(
    config: RunConfig, files: Sequence[str], tokenizer: "Tokenizer"
) -> tuple[dict[str, "TokenizedRows"], str | None]:
    """The rows of each file, or of training and evaluation; and what there is to say of both."""
    from phi3_jax.data import prepare_data

    seed = config.training.seed
    if not files:
        prepared = prepare_data(config.data, tokenizer, seed=seed)
        return prepared.sets, prepared.note
    alone = replace(config.data, eval=None, eval_split=None, eval_fraction=0.0)
    return {
        file: prepare_data(replace(alone, train=file), tokenizer, seed=seed).train for file in dict.fromkeys(files)
    }, None


def _step_rows(config: RunConfig) -> int | None:
    """Sequences of a training step; None where only the devices will tell."""
    if config.parallel.axes == "auto":
        return None
    shares = config.parallel.data * config.parallel.fsdp
    training = config.training
    return training.per_device_train_batch_size * training.gradient_accumulation_steps * shares if shares > 0 else None


def _described(name: str, rows: "TokenizedRows", tokenizer: "Tokenizer", show: int) -> dict[str, object]:
    """A set for JSON: its counts, and its first rows."""
    from phi3_jax.data.preview import mark, runs

    first = []
    for index in range(min(show, len(rows))):
        ids, mask = rows[index]
        first.append(
            {
                "row": rows.where(index),
                "text": mark(runs(rows, tokenizer, index, tokens=len(ids))),
                "input_ids": ids.tolist(),
                "loss_mask": mask.tolist(),
            }
        )
    return {"name": name, **rows.stats.to_dict(), "first_rows": first}
