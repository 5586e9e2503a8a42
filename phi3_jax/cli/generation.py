"""The options for how to generate and with which adapters, of the commands that answer."""

import argparse
import json
from collections.abc import Sequence
from typing import Any

from phi3_jax.cli.parser import positive
from phi3_jax.config.names import BASE, NONE
from phi3_jax.system.errors import InputError

_SAMPLING = ("temperature", "top_k", "top_p", "min_p")


def add_adapters_argument(parser: argparse.ArgumentParser, help: str) -> None:
    parser.add_argument("--adapter", action="append", default=[], metavar="[NAME=]PATH", help=help)


def add_generation_arguments(parser: argparse.ArgumentParser, *, max_new_tokens: int) -> None:
    """An option for every setting of `GenerationConfig`; what is not given is the checkpoint's.

    **Arguments**: `max_new_tokens`, the default where the checkpoint has none either.
    """
    group = parser.add_argument_group("how to answer", "what is not given is as generation_config.json says")
    add = group.add_argument
    add("--max-new-tokens", type=positive, metavar="N", help=f"longest answer (default: {max_new_tokens})")
    add("--max-time", type=float, metavar="SECONDS", help="begin no further token after so long")
    add(
        "--do-sample",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="draw each token; --temperature, --top-k, --top-p and --min-p switch it on",
    )
    add("--temperature", type=float, metavar="X", help="below 1 the likely tokens become likelier")
    add("--top-k", type=int, metavar="N", help="draw from the N likeliest tokens, 0: from all")
    add("--top-p", type=float, metavar="X", help="draw from the likeliest tokens of this share together")
    add("--min-p", type=float, metavar="X", help="draw from tokens of at least this share of the likeliest one's")
    add("--repetition-penalty", type=float, metavar="X", help="above 1 tokens that were there become less likely")
    add("--num-beams", type=positive, metavar="N", help="beams of a beam search")
    add("--length-penalty", type=float, metavar="X", help="above 0 a beam search prefers longer answers")
    add("--early-stopping", choices=("true", "false", "never"), help="when a beam search is over")
    add("--seed", type=int, metavar="N", help="of what is drawn (default: 0)")
    add(
        "--stop",
        action="append",
        dest="stop_strings",
        metavar="TEXT",
        help="end the answer before this text; may be given again",
    )


def generation_settings(arguments: argparse.Namespace, model: Any, tokenizer: Any, *, max_new_tokens: int) -> Any:
    """The `GenerationConfig` that the options ask for, over the checkpoint's own."""
    from phi3_jax.config.generation import GenerationConfig
    from phi3_jax.generation.text import end_token_ids

    names = (
        "max_new_tokens",
        "max_time",
        "do_sample",
        *_SAMPLING,
        "repetition_penalty",
        "num_beams",
        "length_penalty",
        "seed",
        "stop_strings",
    )
    given = {name: getattr(arguments, name) for name in names}
    given["early_stopping"] = {"true": True, "false": False}.get(arguments.early_stopping, arguments.early_stopping)
    given["num_return_sequences"] = getattr(arguments, "num_return_sequences", 1)
    drawing = [name for name in _SAMPLING if given[name] is not None]
    if drawing and arguments.do_sample is False:
        raise InputError(f"--{drawing[0].replace('_', '-')} has no effect with --no-do-sample; leave one of them out")
    if drawing:
        given["do_sample"] = True
    if given["max_new_tokens"] is None and json.loads(model.config.generation).get("max_new_tokens") is None:
        # A prompt needs some of the positions, too.
        given["max_new_tokens"] = min(max_new_tokens, model.config.max_position_embeddings // 2)
    return GenerationConfig.from_model(model.config, eos_token_id=end_token_ids(tokenizer, model.config), **given)


def load_adapters(given: Sequence[str], model: Any, *, local_files_only: bool) -> dict[str, Any]:
    """The adapters of `--adapter`, by name; None for `none`, the base."""
    from phi3_jax.chat.session import check_name, named_adapter
    from phi3_jax.peft.adapter import load_adapter

    adapters: dict[str, Any] = {}
    for text in given:
        if text == NONE:
            adapters[BASE] = None
            continue
        name, path = named_adapter(text)
        check_name(name, adapters)
        adapters[name] = load_adapter(path, model, local_files_only=local_files_only)
    return adapters
