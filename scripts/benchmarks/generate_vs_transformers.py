"""Greedy answers against transformers' `generate`, on the same weights, taking turns.

    python scripts/benchmarks/generate_vs_transformers.py
    python scripts/benchmarks/generate_vs_transformers.py --batch 8

A turn is a whole call of `generate` on each side: the prompts' pass and every new token. The weights are random, made
by transformers, and both sides have to come to the same tokens (`loss` in the JSON is their sum). transformers runs
eagerly, as it does by default. Prints a table and, last, one line of JSON.
"""

import argparse
import tempfile
from functools import partial

import numpy as np
from turns import Steps, reset_resident_peak, resident_bytes, run


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--config", metavar="PATH", help="folder whose config.json says the shape, instead of the options below")
    add("--hidden", type=int, default=512)
    add("--layers", type=int, default=8)
    add("--heads", type=int, default=8)
    add("--vocab", type=int, default=32064)
    add("--batch", type=int, default=1)
    add("--prompt", type=int, default=64, help="tokens in a prompt (default: 64)")
    add("--new-tokens", type=int, default=64)
    add("--dtype", choices=("float32", "bfloat16"), default="float32")
    add("--device", choices=("cpu", "cuda"), default="cpu")
    add("--threads", type=int, default=2, help="cores for each, on a CPU (default: 2)")
    add("--warmup", type=int, default=1, help="answers before the first turn (default: 1)")
    add("--steps", type=int, default=2, help="answers in a turn (default: 2)")
    add("--rounds", type=int, default=7, help="turns of each (default: 7)")
    return parser.parse_args()


def make_checkpoint(settings: argparse.Namespace) -> None:
    import torch
    import transformers

    torch.manual_seed(0)
    config = (
        transformers.Phi3Config.from_pretrained(settings.config)
        if settings.config
        else transformers.Phi3Config(
            vocab_size=settings.vocab,
            hidden_size=settings.hidden,
            intermediate_size=64 * round(settings.hidden * 8 / 3 / 64),
            num_hidden_layers=settings.layers,
            num_attention_heads=settings.heads,
            num_key_value_heads=settings.heads,
            pad_token_id=0,
            initializer_range=0.05,  # wide enough that no two logits are the same but for rounding
        )
    )
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=getattr(torch, settings.dtype))
    model.save_pretrained(settings.folder)


def prompts(settings: argparse.Namespace) -> np.ndarray:
    return np.random.default_rng(0).integers(3, 1000, (settings.batch, settings.prompt))


def with_checkpoint(folder: str) -> argparse.Namespace:
    settings = arguments()
    settings.folder = folder
    make_checkpoint(settings)
    return settings


def our_answers(settings: argparse.Namespace) -> Steps:
    import jax

    import phi3_jax as p3

    model = p3.Phi3ForCausalLM.from_pretrained(settings.folder, dtype=settings.dtype)
    tokens = prompts(settings)

    def step() -> float:
        answers = p3.generate(model, tokens, max_new_tokens=settings.new_tokens, eos_token_id=())
        return float(np.asarray(answers).sum())

    versions = {"jax": jax.__version__}
    return Steps(step, resident_bytes, lambda: resident_bytes("VmHWM"), reset_resident_peak, versions)


def their_answers(settings: argparse.Namespace) -> Steps:
    import torch
    import transformers

    torch.set_num_threads(settings.threads)
    dtype = getattr(torch, settings.dtype)
    model = transformers.AutoModelForCausalLM.from_pretrained(settings.folder, dtype=dtype).to(settings.device).eval()
    tokens = torch.tensor(prompts(settings), device=settings.device)
    mask = torch.ones_like(tokens)

    def step() -> float:
        new = settings.new_tokens
        answers = model.generate(
            tokens, attention_mask=mask, max_new_tokens=new, do_sample=False, eos_token_id=None, pad_token_id=0
        )
        return float(answers.sum())

    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    return Steps(step, resident_bytes, lambda: resident_bytes("VmHWM"), reset_resident_peak, versions)


def describe(settings: argparse.Namespace) -> tuple[str, int]:
    shape = settings.config or f"{settings.hidden} x {settings.layers}"
    case = (
        f"{settings.device} {settings.dtype}, {shape}, prompt {settings.prompt}, {settings.new_tokens} new tokens, "
        f"batch {settings.batch}"
    )
    return case, settings.batch * settings.new_tokens


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        makers = {"phi3_jax": our_answers, "transformers": their_answers}
        run(__file__, makers, partial(with_checkpoint, folder), describe)
