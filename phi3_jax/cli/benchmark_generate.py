"""`phi3-jax benchmark generate`: how fast a model decodes."""

import argparse
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from phi3_jax.cli.parser import Parser, add_hub_arguments, hub_of, positive
from phi3_jax.cli.shape import add_shape_arguments, print_figures, random_shape, refuse_shape

if TYPE_CHECKING:
    from phi3_jax.lora import Lora
    from phi3_jax.model import Phi3ForCausalLM
    from phi3_jax.peft.adapter import PeftAdapter

DESCRIPTION = """Measure greedy decoding with a cache, on one device. The prompt's pass and compilation are measured
apart. The model is that of --model, whose weights are read where the folder has any and drawn at random where it has
only config.json; or a shape given here."""

EPILOG = """The last line of output is one JSON object: tokens_per_second, of all rows, decoding alone; token_seconds,
of one step of all rows; prompt_seconds, until the first tokens; compile_seconds; bytes_per_step, the weights and
cache that a step reads; bandwidth_utilisation, of the device's peak, null where that is not known; versions and
settings."""


def run(argv: Sequence[str]) -> None:
    """Runs `phi3-jax benchmark generate`."""
    options = make_parser().parse(argv)
    if options.model is not None:
        refuse_shape(options, "--model")

    from phi3_jax.parallel.mesh import device_line
    from phi3_jax.peft.adapter import PeftAdapter
    from phi3_jax.performance.generate import benchmark_generate
    from phi3_jax.system.telling import tell_first

    tell_first(device_line)
    adapter = None if options.adapter is None else PeftAdapter.open(options.adapter, hub_of(options).at(None))
    model, lora = _model_and_lora(options, adapter)
    result = benchmark_generate(
        model, lora, batch=options.batch, prompt=options.prompt, new_tokens=options.new_tokens, rounds=options.rounds
    )
    if not options.json:
        _print_table(result)
    print(json.dumps(result))


def make_parser() -> Parser:
    """The options of `phi3-jax benchmark generate`."""
    parser = Parser("benchmark generate", DESCRIPTION, EPILOG)
    add = parser.add_argument
    add("--model", metavar="PATH", help="checkpoint folder, or a folder with config.json alone")
    add("--adapter", metavar="PATH", help="folder of an adapter, run or checkpoint, or hub id (PEFT)")
    add_shape_arguments(parser)
    add("--batch", type=positive, default=1, metavar="N", help="prompts side by side (default: 1)")
    add("--prompt", type=positive, default=64, metavar="N", help="tokens in each prompt (default: 64)")
    add("--new-tokens", type=positive, default=64, metavar="N", help="tokens in each answer (default: 64)")
    add("--rounds", type=positive, default=5, metavar="N", help="times to measure (default: 5)")
    add(
        "--dtype",
        choices=("auto", "bfloat16", "float32", "float16"),
        default="auto",
        help="type of the weights; auto: bfloat16, on a CPU float32",
    )
    add("--quantization", choices=("nf4", "int8"), help="what the linear layers of the base are kept in")
    add_hub_arguments(parser)
    add("--json", action="store_true", help="print the JSON object alone")
    return parser


def _model_and_lora(
    options: argparse.Namespace, adapter: "PeftAdapter | None"
) -> "tuple[Phi3ForCausalLM, Lora | None]":
    from phi3_jax.parallel.mesh import auto_dtype
    from phi3_jax.peft.base import open_base
    from phi3_jax.performance.weights import random_model
    from phi3_jax.system.telling import taking

    dtype, lora = auto_dtype(options.dtype), None
    if options.model is None:
        config = random_shape(options, options.prompt + options.new_tokens)
    else:
        checkpoint = open_base(options.model, [] if adapter is None else [adapter], hub_of(options))
        config = checkpoint.config
        if adapter is not None:  # before the weights, which may take minutes
            lora = adapter.load(checkpoint.shapes, checkpoint)
        if checkpoint.has_weights:
            return checkpoint.load_model(dtype=dtype, quantization=options.quantization), lora
    with taking("drawing random weights"):
        model = random_model(config, dtype=dtype, quantization=options.quantization)
    return model, adapter.load(model) if adapter is not None and lora is None else lora


def _print_table(result: dict[str, Any]) -> None:
    used = result["bandwidth_utilisation"]
    figures = {
        "settings": ", ".join(f"{name} {value}" for name, value in result["settings"].items()),
        "device": result["device_kind"],
        "tokens per second": f"{result['tokens_per_second']:,.1f}",
        "step": f"{result['token_seconds'] * 1000:.2f} ms, median of {result['settings']['rounds']} rounds",
        "prompt": f"{result['prompt_seconds'] * 1000:.1f} ms",
        "compilation": f"{result['compile_seconds']:.1f} s",
        "read in a step": f"{result['bytes_per_step'] / 1e9:.3f} GB",
        "of peak bandwidth": "device's peak not known" if used is None else f"{used:.1%}",
    }
    print_figures(figures)
