"""`phi3-jax benchmark train`: how fast a run's step is and what memory it takes, with random weights."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from jsonargparse import Namespace

from phi3_jax.cli.parser import positive
from phi3_jax.cli.run_options import RunParser, make_run, read_run
from phi3_jax.cli.shape import add_shape_arguments, print_figures, random_shape, refuse_shape
from phi3_jax.config.model import Phi3Config
from phi3_jax.config.parse import Raw, merged
from phi3_jax.config.run import RunConfig
from phi3_jax.system.errors import InputError

DESCRIPTION = """Measure the train step with random weights and random rows; nothing is downloaded or written. The model
is that of --config, of which only config.json is read, or a shape given here."""

EPILOG = """Every key of a run can be given as with `phi3-jax train`: --peft.use_dora true. The last line of output is
one JSON object: tokens_per_second, of all devices; step_seconds, the median; compile_seconds; peak_memory_gb, in 10^9
bytes, of the fullest device, or where the backend does not count (memory_kind says so) of the whole process;
flops_per_token, recomputation not counted; mfu, of the devices' dense bfloat16 peak, null where that is not known;
devices, versions and settings."""

# Option -> the key of a run that it stands for, and what it is.
SHORT = {
    "seq": ("data.max_length", "N", "tokens in a row (default: 512)"),
    "batch": ("training.per_device_train_batch_size", "N", "rows in a forward pass (default: 2)"),
    "accumulation": ("training.gradient_accumulation_steps", "N", "forward passes in a step (default: 1)"),
    "dtype": ("model.dtype", "TYPE", "bfloat16, float32 or float16 (default: bfloat16, on a CPU float32)"),
    "quantization": ("model.quantization", "KIND", "nf4 or int8: what the base's linear layers are kept in"),
    "attention": ("model.attention", "KIND", "attention kernel (default: auto)"),
    "rank": ("peft.r", "N", "of the adapter, on all linear layers (default: 16)"),
    "remat": ("training.remat_policy", "POLICY", "what is computed again in the backward pass (default: none)"),
}
# Where no model is named: a plain LoRA run that recomputes nothing.
DEFAULTS: Raw = {
    "model": {"name_or_path": "random"},
    "peft": {"r": 16, "lora_alpha": 32, "lora_dropout": 0.0, "target_modules": "all-linear"},
    "data": {"max_length": 512},
    "training": {"per_device_train_batch_size": 2, "gradient_checkpointing": False},
}


def run(argv: Sequence[str]) -> None:
    """Runs `phi3-jax benchmark train`."""
    options = make_parser().parse(argv)
    _spell_out(options)
    raw = read_run(options)
    model = raw.get("model")
    is_random = not (isinstance(model, Mapping) and model.get("name_or_path"))
    if not is_random:
        refuse_shape(options, "model.name_or_path")
    elif options.config:
        raise InputError("--config names no model; give model.name_or_path in it, or leave --config out")

    from phi3_jax.parallel.distributed import initialize, is_main
    from phi3_jax.parallel.mesh import auto_dtype, device_line
    from phi3_jax.system.telling import tell_first

    initialize()
    tell_first(device_line)
    if is_random:
        raw = merged(DEFAULTS, {"model": {"dtype": auto_dtype("auto")}}, raw)
    run = make_run(raw)
    config = random_shape(options, run.data.limit) if is_random else _named(run)

    from phi3_jax.performance.here import with_axes
    from phi3_jax.performance.train import benchmark_train

    run = with_axes(run, config)
    result = benchmark_train(run, config, steps=options.steps, warmup=options.warmup, documents=options.documents)
    if not is_main():
        return
    if not options.json:
        _print_table(result)
    print(json.dumps(result))


def make_parser() -> RunParser:
    """The options of `phi3-jax benchmark train`."""
    parser = RunParser("benchmark train", DESCRIPTION, EPILOG)
    add = parser.add_argument
    add_shape_arguments(parser)
    for name, (_, metavar, text) in SHORT.items():
        add(f"--{name}", metavar=metavar, help=text)
    add("--documents", type=positive, default=1, metavar="N", help="documents packed in a row (default: 1)")
    add("--steps", type=positive, default=10, metavar="N", help="steps to time (default: 10)")
    add("--warmup", type=positive, default=2, metavar="N", help="steps before those (default: 2)")
    add("--json", action="store_true", help="print the JSON object alone")
    return parser


def _spell_out(options: Namespace) -> None:
    """Gives the keys of a run what their short options say."""
    for short, (key, *_) in SHORT.items():
        given = {key: options[short]}
        if short == "remat" and options.remat is not None:
            given = {"training.gradient_checkpointing": str(options.remat != "none").lower()}
            given |= {} if options.remat == "none" else {key: options.remat}
        for name, value in given.items():
            if value is None:
                continue
            if name in options:
                raise InputError(f"--{name} and the short option for it are both given; leave one out")
            options[name] = value


def _named(run: RunConfig) -> Phi3Config:
    """The shape of the checkpoint that the run names."""
    from phi3_jax.hf.checkpoint import Checkpoint

    return Checkpoint.open_config(run.model.name_or_path, run.model.hub).config


def _print_table(result: dict[str, Any]) -> None:
    settings = ", ".join(f"{name} {value}" for name, value in result["settings"].items() if value is not None)
    mfu = "device's peak not known" if result["mfu"] is None else f"{result['mfu']:.1%}"
    memory = "of the device" if result["memory_kind"] == "device" else "resident, of the whole process"
    figures = {
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
    print_figures(figures)
