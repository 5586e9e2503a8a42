"""The train step against transformers + PEFT: the same shape, rank and rows, taking turns in one run.

    python scripts/benchmarks/train_vs_peft.py --dtype bfloat16
    python scripts/benchmarks/train_vs_peft.py --device cuda --dtype bfloat16 --hidden 3072 --layers 32 --heads 32 \\
        --seq 4096 --batch 4 --gradient-checkpointing --compile

PEFT is used as its users are told to: SDPA without a mask for rows without padding, the fused AdamW that is Trainer's
default, gradients set to None, and in bfloat16 a bfloat16 base with float32 adapters under autocast. Both clip
gradients, both wait for each step's loss. Weights are random, and not the same. Memory is what each process has
resident, on a GPU what its allocator gave out. Prints a table and, last, one line of JSON.
"""

import argparse
from typing import Any

from our_step import ALPHA, LEARNING_RATE, RANK, VOCAB, our_steps
from turns import Steps, reset_resident_peak, resident_bytes, run


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--hidden", type=int, default=512)
    add("--layers", type=int, default=8)
    add("--heads", type=int, default=8)
    add("--intermediate", type=int, help="default: 8/3 of the width, in whole 64s")
    add("--seq", type=int, default=512)
    add("--batch", type=int, default=2)
    add("--dtype", choices=("float32", "bfloat16"), default="float32")
    add("--gradient-checkpointing", action="store_true", help="of both; ours with --remat")
    add("--remat", default="full", help="our policy with --gradient-checkpointing (default: full)")
    add("--device", choices=("cpu", "cuda"), default="cpu")
    add("--threads", type=int, default=2, help="cores for each, on a CPU (default: 2)")
    add("--attention", choices=("sdpa", "eager"), default="sdpa", help="of transformers (default: sdpa)")
    add("--compile", action="store_true", help="torch.compile for the peer")
    add("--warmup", type=int, default=2, help="steps before the first turn (default: 2)")
    add("--steps", type=int, default=5, help="steps in a turn (default: 5)")
    add("--rounds", type=int, default=5, help="turns of each (default: 5)")
    settings = parser.parse_args()
    settings.intermediate = settings.intermediate or 64 * round(settings.hidden * 8 / 3 / 64)
    return settings


def peft_steps(settings: argparse.Namespace) -> Steps:
    import numpy as np
    import peft
    import torch
    import transformers

    torch.set_num_threads(settings.threads)
    torch.manual_seed(0)
    dtype = getattr(torch, settings.dtype)
    # What every configuration takes, its generated signature does not list.
    common: Any = {"use_cache": False, "attn_implementation": settings.attention, "dtype": dtype}
    config = transformers.Phi3Config(
        vocab_size=VOCAB,
        hidden_size=settings.hidden,
        intermediate_size=settings.intermediate,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        num_key_value_heads=settings.heads,
        max_position_embeddings=max(4096, settings.seq),
        **common,
    )
    with torch.device(settings.device):
        base = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    if settings.gradient_checkpointing:
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    lora = peft.LoraConfig(
        r=RANK, lora_alpha=ALPHA, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    model = peft.get_peft_model(base, lora).train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if {parameter.dtype for parameter in trained} != {torch.float32}:
        raise SystemExit("PEFT's adapters are not float32, as they are by default")
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, weight_decay=0.0, fused=True)
    called: Any = torch.compile(model) if settings.compile else model
    rng = np.random.default_rng(0)

    def step() -> float:
        rows = rng.integers(0, VOCAB, (settings.batch, settings.seq))
        tokens = torch.from_numpy(rows).to(settings.device, non_blocking=True)
        with torch.autocast(settings.device, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            loss = called(input_ids=tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss.item())

    on_gpu = settings.device == "cuda"
    versions = {"torch": torch.__version__, "transformers": transformers.__version__, "peft": peft.__version__}
    return Steps(
        step=step,
        memory=torch.cuda.memory_allocated if on_gpu else resident_bytes,
        peak=torch.cuda.max_memory_allocated if on_gpu else lambda: resident_bytes("VmHWM"),
        reset=torch.cuda.reset_peak_memory_stats if on_gpu else reset_resident_peak,
        about=versions,
    )


def describe(settings: argparse.Namespace) -> tuple[str, int]:
    case = (
        f"{settings.device} {settings.dtype}, {settings.hidden} x {settings.layers}, length {settings.seq}, "
        f"batch {settings.batch}{', checkpointing' * settings.gradient_checkpointing}"
        f"{', torch.compile' * settings.compile}"
    )
    return case, settings.batch * settings.seq


if __name__ == "__main__":
    run(__file__, {"phi3_jax": our_steps, "PEFT": peft_steps}, arguments, describe)
