"""The train step against keras-hub's Phi-3 on Keras' JAX backend: the same shape, rank and rows, taking turns.

    python -m venv /tmp/keras && /tmp/keras/bin/pip install keras keras-hub jax
    python scripts/benchmarks/train_vs_keras_hub.py --peer-python /tmp/keras/bin/python

What `Backbone.enable_lora` adapts is query and value, so both sides have adapters on q_proj and v_proj alone. Not the
same: in bfloat16 Keras keeps its adapters and optimizer state in bfloat16 too, ours are float32; its loss counts every
position, ours all but the last; it has no packing. Both are compiled by XLA, clip gradients and give each step's
loss to the host. On a CPU; prints a table and, last, one line of JSON.
"""

import argparse
import os
from collections.abc import Callable
from functools import partial

from our_step import LEARNING_RATE, RANK, VOCAB, our_steps
from turns import Steps, reset_resident_peak, resident_bytes, run


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--peer-python", required=True, metavar="PATH", help="Python that has keras-hub and jax")
    add("--hidden", type=int, default=512)
    add("--layers", type=int, default=8)
    add("--heads", type=int, default=8)
    add("--seq", type=int, default=512)
    add("--batch", type=int, default=2)
    add("--dtype", choices=("float32", "bfloat16"), default="float32")
    add("--threads", type=int, default=2, help="cores for each (default: 2)")
    add("--warmup", type=int, default=2, help="steps before the first turn (default: 2)")
    add("--steps", type=int, default=5, help="steps in a turn (default: 5)")
    add("--rounds", type=int, default=5, help="turns of each (default: 5)")
    settings = parser.parse_args()
    settings.intermediate = 64 * round(settings.hidden * 8 / 3 / 64)
    settings.device, settings.gradient_checkpointing, settings.remat = "cpu", False, "none"
    return settings


def keras_steps(settings: argparse.Namespace) -> Steps:
    os.environ["KERAS_BACKEND"] = "jax"
    import jax
    import keras
    import keras_hub
    import numpy as np

    backbone = keras_hub.models.Phi3Backbone(
        vocabulary_size=VOCAB,
        num_layers=settings.layers,
        hidden_dim=settings.hidden,
        intermediate_dim=settings.intermediate,
        num_query_heads=settings.heads,
        num_key_value_heads=settings.heads,
        dropout=0.0,
        max_sequence_length=max(4096, settings.seq),
        dtype=settings.dtype,
    )
    backbone.enable_lora(RANK)
    model = keras_hub.models.Phi3CausalLM(backbone=backbone, preprocessor=None)
    model.compile(
        optimizer=keras.optimizers.AdamW(LEARNING_RATE, weight_decay=0.0, global_clipnorm=1.0),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        weighted_metrics=[],
        jit_compile=True,
    )
    rng = np.random.default_rng(0)

    def step() -> float:
        tokens = rng.integers(0, VOCAB, (settings.batch, settings.seq + 1), np.int32)
        rows = {"token_ids": tokens[:, :-1], "padding_mask": np.ones((settings.batch, settings.seq), bool)}
        return float(model.train_on_batch(rows, tokens[:, 1:]))

    return Steps(
        step=step,
        memory=resident_bytes,
        peak=lambda: resident_bytes("VmHWM"),
        reset=reset_resident_peak,
        about={"keras": keras.__version__, "keras-hub": keras_hub.__version__, "jax": jax.__version__},
    )


def describe(settings: argparse.Namespace) -> tuple[str, int]:
    case = (
        f"cpu {settings.dtype}, {settings.hidden} x {settings.layers}, length {settings.seq}, batch {settings.batch}, "
        "query and value"
    )
    return case, settings.batch * settings.seq


if __name__ == "__main__":
    ours: Callable[[argparse.Namespace], Steps] = partial(our_steps, target_modules=["q_proj", "v_proj"])
    makers = {"phi3_jax": ours, "keras-hub": keras_steps}
    run(__file__, makers, arguments, describe)
