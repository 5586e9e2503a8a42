"""Our side of the comparisons: the train step of a run, as `phi3-jax benchmark train` has it."""

import argparse
from typing import Any

from turns import Steps, reset_resident_peak, resident_bytes

RANK, ALPHA, LEARNING_RATE, VOCAB = 16, 32, 1e-4, 32064


def our_steps(settings: argparse.Namespace, target_modules: Any = "all-linear") -> Steps:
    """Args:
    settings: The options of the comparison.
    target_modules: What gets an adapter.
    """
    import jax
    import numpy as np

    from phi3_jax.config.model import Phi3Config
    from phi3_jax.config.run import RunConfig
    from phi3_jax.performance.train import prepare, random_batch

    run = RunConfig.from_dict(
        {
            "model": {"name_or_path": "random", "dtype": settings.dtype},
            "peft": {"r": RANK, "lora_alpha": ALPHA, "lora_dropout": 0.0, "target_modules": target_modules},
            "data": {"max_length": settings.seq},
            "training": {
                "per_device_train_batch_size": settings.batch,
                "learning_rate": LEARNING_RATE,
                "gradient_checkpointing": settings.gradient_checkpointing,
                "remat_policy": settings.remat,
            },
        }
    )
    config = Phi3Config(
        vocab_size=VOCAB,
        hidden_size=settings.hidden,
        intermediate_size=settings.intermediate,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        num_key_value_heads=settings.heads,
        head_dim=settings.hidden // settings.heads,
        max_position_embeddings=max(4096, settings.seq),
    )
    workload = prepare(run, config, steps=settings.warmup + settings.steps * settings.rounds)
    state, rng = jax.block_until_ready(workload.state), np.random.default_rng(0)
    before = 0.0

    def step() -> float:
        nonlocal state, before  # the state sums losses up
        batch = random_batch(rng, run, config, rows=workload.rows)
        state = workload.train_step(state, workload.job.frozen, jax.device_put(batch))
        total = float(state.window.loss)
        loss, before = total - before, total
        return float(loss / (settings.batch * (settings.seq - 1)))

    device = jax.devices()[0]
    on_gpu = settings.device == "cuda"
    if on_gpu and device.platform != "gpu":
        raise SystemExit(f"--device cuda, but JAX has {device.device_kind}; pip install 'phi3_jax[cuda13]'")
    return Steps(
        step=step,
        memory=(lambda: device.memory_stats()["bytes_in_use"]) if on_gpu else resident_bytes,
        # The allocator's peak cannot be started anew; nothing before the steps needs more.
        peak=(lambda: device.memory_stats()["peak_bytes_in_use"]) if on_gpu else lambda: resident_bytes("VmHWM"),
        reset=(lambda: None) if on_gpu else reset_resident_peak,
        about={"jax": jax.__version__, "device": device.device_kind},
    )
