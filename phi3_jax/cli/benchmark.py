"""`phi3-jax benchmark`, and its `train`: how fast a run's step is and what memory it takes, with random weights."""

import argparse
import json
import sys
from collections.abc import Sequence
from typing import Any

from phi3_jax.cli.parser import Parser, positive
from phi3_jax.config.model import Phi3Config
from phi3_jax.config.names import nearest
from phi3_jax.system.errors import InputError
from phi3_jax.system.text import printable

USAGE = """\
usage: phi3-jax benchmark train|generate [options]

train measures the train step with random weights, generate how fast a model decodes;
`phi3-jax benchmark train --help` and `phi3-jax benchmark generate --help` list the options.
"""

DESCRIPTION = """Measure the train step with random weights and random rows; nothing is downloaded or written. The model
is that of --config, of which only config.json is read, or a shape given here."""

EPILOG = """Every key of a run can be given as with `phi3-jax train`: --peft.use_dora true. The last line of output is
one JSON object: tokens_per_second, of all devices; step_seconds, the median; compile_seconds; peak_memory_gb, in 10^9
bytes, of the fullest device, or where the backend does not count (memory_kind says so) of the whole process;
flops_per_token, recomputation not counted; mfu, of the devices' dense bfloat16 peak, null where that is not known;
devices, versions and settings."""

# Option -> the key of a run that it stands for, and its value where no model is named.
SETTINGS: dict[str, tuple[str, Any]] = {
    "seq": ("data.max_length", 512),
    "batch": ("training.per_device_train_batch_size", 2),
    "accumulation": ("training.gradient_accumulation_steps", 1),
    "dtype": ("model.dtype", "auto"),
    "quantization": ("model.quantization", None),
    "attention": ("model.attention", "auto"),
    "rank": ("peft.r", 16),
}
SHAPE = ("hidden", "layers", "heads", "kv_heads", "intermediate", "vocab")


def run(argv: Sequence[str]) -> None:
    from phi3_jax.cli import benchmark_generate  # which shares options with this module

    benchmarks = {"train": train, "generate": benchmark_generate.run}
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE, end="")
        return
    name, *rest = argv
    if name not in benchmarks:
        raise InputError(f"unknown benchmark {name}; did you mean {nearest(name, list(benchmarks))}?")
    benchmarks[name](rest)


def train(argv: Sequence[str]) -> None:
    options, sections = _parse(argv)

    from phi3_jax.config.run import parse_run_config
    from phi3_jax.parallel.distributed import initialize, is_main

    initialize()
    run, notices = parse_run_config(_with_defaults(sections) if options.random_shape else sections)
    for notice in notices:
        print(printable(notice), file=sys.stderr)
    config = random_shape(options, run.data.max_length) if options.random_shape else _named(run)

    from phi3_jax.performance.train import benchmark_train

    result = benchmark_train(run, config, steps=options.steps, warmup=options.warmup, documents=options.documents)
    if not is_main():
        return
    if not options.json:
        _print_table(result)
    print(json.dumps(result))


def add_shape_arguments(parser: Parser) -> None:
    """The options that `random_shape` reads."""
    add = parser.add_argument
    add("--hidden", type=positive, metavar="N", help="width (default: 512)")
    add("--layers", type=positive, metavar="N", help="decoder layers (default: 8)")
    add("--heads", type=positive, metavar="N", help="default: heads about as wide as Phi-3-mini's 96")
    add("--kv-heads", type=positive, metavar="N", help="default: as many as heads")
    add("--intermediate", type=positive, metavar="N", help="default: 8/3 of the width, in whole 64s")
    add("--vocab", type=positive, metavar="N", help="default: 32064")


def _parser() -> Parser:
    parser = Parser("benchmark train", DESCRIPTION)
    parser.epilog = EPILOG
    add = parser.add_argument
    add("--config", action="append", metavar="FILE", help="YAML file of a run; may be given more than once")
    add_shape_arguments(parser)
    add("--seq", metavar="N", help="tokens in a row (default: 512)")
    add("--batch", metavar="N", help="rows in a forward pass (default: 2)")
    add("--accumulation", metavar="N", help="forward passes in a step (default: 1)")
    add("--documents", type=positive, default=1, metavar="N", help="documents packed in a row (default: 1)")
    add("--dtype", metavar="TYPE", help="bfloat16, float32 or float16 (default: bfloat16, on a CPU float32)")
    add("--quantization", metavar="KIND", help="nf4 or int8: what the base's linear layers are kept in")
    add("--attention", metavar="KIND", help="attention kernel (default: auto)")
    add("--remat", metavar="POLICY", help="what is computed again in the backward pass (default: none)")
    add("--rank", metavar="N", help="of the adapter, on all linear layers (default: 16)")
    add("--steps", type=positive, default=10, metavar="N", help="steps to time (default: 10)")
    add("--warmup", type=positive, default=2, metavar="N", help="steps before those (default: 2)")
    add("--json", action="store_true", help="print the JSON object alone")
    return parser


def _parse(argv: Sequence[str]) -> tuple[argparse.Namespace, dict[str, Any]]:
    """The options, and the sections of the run that they and `--section.key value` spell out.

    `options.random_shape` says that no model is named.
    """
    from phi3_jax.cli.train import read_arguments

    plain, dotted = _split(argv)
    options = _parser().parse(plain)
    given = {key: value for key, value in _settings(options).items() if value is not None}
    for key in given:
        if any(token.partition("=")[0] == f"--{key}" for token in dotted):
            raise InputError(f"--{key} and the short option for it are both given; leave one out")
    files = [token for file in options.config or () for token in ("--config", file)]
    raw, _ = read_arguments([*files, *dotted, *(f"--{key}={value}" for key, value in given.items())])
    options.random_shape = not (raw.get("model") or {}).get("name_or_path")
    shape = [name for name in SHAPE if getattr(options, name) is not None]
    if options.random_shape and options.config:
        raise InputError("--config names no model; give model.name_or_path in it, or leave --config out")
    if shape and not options.random_shape:
        raise InputError(
            f"--{shape[0].replace('_', '-')} is given, but model.name_or_path says what the model's shape is; "
            "leave one of them out"
        )
    return options, raw


def _split(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """The tokens of our own options, and those of `--section.key value`."""
    plain: list[str] = []
    dotted: list[str] = []
    tokens = iter(argv)
    for token in tokens:
        name, equals, _ = token.partition("=")
        if not (name.startswith("--") and "." in name):
            plain.append(token)
            continue
        dotted.append(token)
        if not equals:
            dotted += [value for value in (next(tokens, None),) if value is not None]
    return plain, dotted


def _settings(options: argparse.Namespace) -> dict[str, Any]:
    """Key of a run -> what was given for it, None where nothing was."""
    values = {key: getattr(options, option) for option, (key, _) in SETTINGS.items()}
    if options.remat is not None:
        is_on = options.remat != "none"
        values["training.gradient_checkpointing"] = str(is_on).lower()
        if is_on:
            values["training.remat_policy"] = options.remat
    return values


def _with_defaults(raw: dict[str, Any]) -> dict[str, Any]:
    """The sections, completed for a model that has no name: a plain LoRA run that recomputes nothing."""
    from phi3_jax.parallel.mesh import auto_dtype

    values = dict(SETTINGS.values())
    values["model.dtype"] = auto_dtype("auto")
    values |= {
        "model.name_or_path": "random",
        "peft.lora_alpha": 32,
        "peft.lora_dropout": 0.0,
        "peft.target_modules": "all-linear",
        "training.gradient_checkpointing": False,
    }
    sections: dict[str, Any] = {}
    for key, value in values.items():
        section, name = key.split(".")
        sections.setdefault(section, {})[name] = value
    return {name: {**sections.get(name, {}), **(raw.get(name) or {})} for name in {**sections, **raw}}


def random_shape(options: argparse.Namespace, seq: int) -> Phi3Config:
    """The model that the options describe, with Phi-3-mini's proportions where they are silent."""
    hidden, vocab = options.hidden or 512, options.vocab or 32064
    heads = options.heads or _default_heads(hidden)
    kv_heads = options.kv_heads or heads
    if hidden % (2 * heads):
        raise InputError(f"--hidden {hidden} does not make {heads} heads of an even width; give another --heads")
    if heads % kv_heads:
        raise InputError(f"--heads {heads} cannot share {kv_heads} key-value heads evenly; give another --kv-heads")
    return Phi3Config(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=options.intermediate or max(64, 64 * round(hidden * 8 / 3 / 64)),
        num_hidden_layers=options.layers or 8,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=hidden // heads,
        max_position_embeddings=max(4096, seq),
        pad_token_id=None,
    )


def _default_heads(hidden: int) -> int:
    """As many as make their even width the nearest to Phi-3-mini's 96; the narrower where two are."""
    widths = [width for width in range(2, hidden + 1, 2) if hidden % width == 0]
    if not widths:
        raise InputError(f"--hidden {hidden} is odd, and heads have an even width; give an even number")
    return hidden // min(widths, key=lambda width: abs(width - 96))


def _named(run: Any) -> Phi3Config:
    """The shape of the checkpoint that the run names."""
    from phi3_jax.hf.checkpoint import read_config
    from phi3_jax.hf.hub import resolve_checkpoint

    section = run.model
    folder = resolve_checkpoint(
        section.name_or_path, revision=section.revision, patterns=("config.json",), **section.hub
    )
    return read_config(folder)


def _print_table(result: dict[str, Any]) -> None:
    settings = ", ".join(f"{name} {value}" for name, value in result["settings"].items() if value is not None)
    mfu = "device's peak not known" if result["mfu"] is None else f"{result['mfu']:.1%}"
    memory = "of the device" if result["memory_kind"] == "device" else "resident, of the whole process"
    rows = {
        "settings": settings,
        "device": f"{result['devices']} x {result['device_kind']}",
        "trained parameters": f"{result['trainable_parameters']:,}",
        "tokens per second": f"{result['tokens_per_second']:,.1f}",
        "step": f"{result['step_seconds']:.4f} s, median of {result['steps']}",
        "compilation": f"{result['compile_seconds']:.1f} s",
        "peak memory": f"{result['peak_memory_gb']:.3f} GB, {memory}",
        "FLOP a token": f"{result['flops_per_token']:.4g}",
        "MFU": mfu,
        "loss": f"{result['loss']:.4f}",
    }
    for name, value in rows.items():
        print(f"{name:<19} {value}")
