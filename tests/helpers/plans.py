"""Runs of small and full-size models for the tests of `plan`: configurations alone, no weights."""

import json
from pathlib import Path
from typing import Any

from phi3_jax.config.model import Phi3Config
from phi3_jax.config.run import RunConfig
from phi3_jax.performance.plan import Plan
from phi3_jax.performance.topology import JAX_GPU_SHARE

MINI = {
    "model_type": "phi3",
    "vocab_size": 32064,
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "max_position_embeddings": 4096,
    "sliding_window": 2047,
}
SMALL = {
    **MINI,
    "vocab_size": 512,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}

_LONGROPE = {"type": "longrope", "short_factor": [1.0] * 48, "long_factor": [1.0] * 48}
LONG = {
    **MINI,
    "max_position_embeddings": 131072,
    "original_max_position_embeddings": 4096,
    "sliding_window": 262144,
    "rope_scaling": _LONGROPE,
}
PHI4_MINI = {
    **LONG,
    "vocab_size": 200064,
    "num_attention_heads": 24,
    "num_key_value_heads": 8,
    "tie_word_embeddings": True,
    "partial_rotary_factor": 0.75,
}
# What config.json says, as far as memory and time go; the factors of LongRoPE are not theirs.
ON_THE_HUB = {
    "microsoft/Phi-3-mini-4k-instruct": MINI,
    "microsoft/Phi-3-mini-128k-instruct": LONG,
    "microsoft/Phi-3.5-mini-instruct": LONG,
    "microsoft/Phi-4-mini-instruct": PHI4_MINI,
}
_SIZES = (8, 12, 16, 24, 32, 40, 48, 80, 141, 180)  # GB, of devices that people have


def checkpoint(folder: Path, raw: dict[str, Any]) -> str:
    """A folder with config.json and nothing else."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(raw))
    return str(folder)


def run_of(raw: dict[str, Any], **sections: dict[str, Any]) -> tuple[RunConfig, Phi3Config]:
    """A run, and its model's configuration, for functions that read no files."""
    model = {"name_or_path": "none", **sections.pop("model", {})}
    peft = {"r": 16, **sections.pop("peft", {})}
    return RunConfig.from_dict({"model": model, "peft": peft, **sections}), Phi3Config.from_dict(raw)


def header(plan: Plan) -> list[str]:
    """The lines of a recipe's header that say what is planned of it for an H100."""
    total = plan.memory.total / 1e9
    usual, most = (next(size for size in _SIZES if total <= share * size) for share in (JAX_GPU_SHARE, 0.95))
    squeezed = f"; {most} GB with XLA_PYTHON_CLIENT_MEM_FRACTION=0.95" if most < usual else ""
    least, longest = (1e8 / rate / 3600 for rate in reversed(plan.time.tokens_per_second or (0.0, 0.0)))
    once, twice = plan.time.flops_per_token / 1e9, plan.time.computed_per_token / 1e9
    takes = f"{once:.2f} GFLOP a token, {twice:.2f} with what is computed twice (phi3-jax plan); 100 million tokens"
    return [
        f"# Needs: {total:.1f} GB of a device's memory (phi3-jax plan): a device with {usual} GB{squeezed}.",
        f"# Takes: {takes}",
        f"# take {least:.1f} to {longest:.1f} hours on an H100.",
    ]
