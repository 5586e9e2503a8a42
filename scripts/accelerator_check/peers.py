"""The same work by PyTorch, transformers and PEFT, where they are installed and see the device that JAX sees."""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from accelerator_check.record import Recorder
from accelerator_check.sizes import Sizes

NEEDED = ("torch", "transformers", "peft")


def why_not(platform: str) -> str | None:
    """Why the peers cannot run beside JAX on this platform; None where they can."""
    absent = [name for name in NEEDED if find_spec(name) is None]
    if absent:
        return f"{', '.join(absent)} not installed"
    import torch

    if platform == "gpu" and not torch.cuda.is_available():
        return f"PyTorch {torch.__version__} sees no GPU"
    return None if platform in ("cpu", "gpu") else f"PyTorch does not use this {platform}"


def time_peft(sizes: Sizes, recorder: Recorder, platform: str, *, compiled: bool) -> None:
    """Steps of PEFT on transformers' model, with SDPA, as `scripts/benchmarks/train_vs_peft.py` takes them."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
    from train_vs_peft import peft_steps

    config, device = sizes.model, "cuda" if platform == "gpu" else "cpu"
    settings = argparse.Namespace(
        threads=_cores(),
        dtype="bfloat16",
        attention="sdpa",
        hidden=config.hidden_size,
        intermediate=config.intermediate_size,
        layers=config.num_hidden_layers,
        heads=config.num_attention_heads,
        seq=sizes.length,
        batch=sizes.rows,
        device=device,
        gradient_checkpointing=True,
        compile=compiled,
    )
    steps = peft_steps(settings)
    recorder.note("versions", ", ".join(f"{name} {version}" for name, version in steps.about.items()))
    seconds, first = _timed(steps.step, sizes.warmup, sizes.steps)
    recorder.figure("first step", first, "s", "with torch.compile" if compiled else "eager")
    recorder.figure("step", seconds, "s", "the median")
    tokens = sizes.rows * sizes.length
    recorder.figure("tokens a second", tokens / seconds, "", f"{sizes.rows} x {sizes.length}, one document a row")
    if device == "cuda":
        recorder.figure("memory at most", steps.peak() / 1e9, "GB", "given out by its allocator")


def time_transformers(sizes: Sizes, recorder: Recorder, platform: str, *, batch: int) -> None:
    """Greedy answers by transformers' `generate`, whole calls less a prompt's pass."""
    import torch
    import transformers

    shape, device = sizes.model, "cuda" if platform == "gpu" else "cpu"
    torch.set_num_threads(_cores())
    # What every configuration takes, its generated signature does not list.
    common: Any = {"attn_implementation": "sdpa", "dtype": torch.bfloat16}
    config = transformers.Phi3Config(
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.num_hidden_layers,
        num_attention_heads=shape.num_attention_heads,
        num_key_value_heads=shape.num_key_value_heads,
        pad_token_id=0,
        **common,
    )
    with torch.device(device):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    tokens = torch.randint(3, shape.vocab_size, (batch, sizes.prompt), device=device)
    mask = torch.ones_like(tokens)

    def answer(new: int) -> float:
        def call() -> None:
            model.generate(
                tokens, attention_mask=mask, min_new_tokens=new, max_new_tokens=new, do_sample=False, eos_token_id=None
            ).sum().item()

        return _timed(call, 1, 3)[0]

    more = sizes.answer - 1
    seconds = answer(sizes.answer) - answer(1)
    recorder.figure("tokens a second", batch * more / seconds, "", f"{sizes.answer} tokens, batch {batch}")


def _timed(step: Callable[[], object], warmup: int, steps: int) -> tuple[float, float]:
    """The median of `steps` after `warmup` others, and the first of all; each ends with a look at its result."""
    seconds = []
    for _ in range(warmup + steps):
        start = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[warmup:]), seconds[0]


def _cores() -> int:
    import os

    return len(os.sched_getaffinity(0))
