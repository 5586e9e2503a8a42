"""What the benchmarks share: a model given by its shape, and how their figures are printed."""

import argparse
from collections.abc import Mapping

from phi3_jax.cli.parser import Parser, positive
from phi3_jax.config.model import Phi3Config
from phi3_jax.system.errors import InputError

_SHAPE = {
    "hidden": "width (default: 512)",
    "layers": "decoder layers (default: 8)",
    "heads": "default: heads about as wide as Phi-3-mini's 96",
    "kv-heads": "default: as many as heads",
    "intermediate": "default: 8/3 of the width, in whole 64s",
    "vocab": "default: 32064",
}


def add_shape_arguments(parser: Parser) -> None:
    """The options that `random_shape` reads."""
    for name, text in _SHAPE.items():
        parser.add_argument(f"--{name}", type=positive, metavar="N", help=text)


def refuse_shape(options: argparse.Namespace, source: str) -> None:
    """Raises `InputError` where a shape is given although `source` names a model."""
    given = [name for name in _SHAPE if getattr(options, name.replace("-", "_")) is not None]
    if given:
        raise InputError(f"--{given[0]} is given, but {source} says what the model's shape is; leave one of them out")


def random_shape(options: argparse.Namespace, seq: int) -> Phi3Config:
    """The model that the options describe, with Phi-3-mini's proportions where they are silent.

    Args:
        options: Those of `add_shape_arguments`.
        seq: Positions that it must have at least.

    Raises:
        InputError: Width and heads do not go together.
    """
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


def print_figures(rows: Mapping[str, str]) -> None:
    """A line for each."""
    for name, value in rows.items():
        print(f"{name:<19} {value}")
