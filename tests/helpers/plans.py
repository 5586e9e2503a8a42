"""Runs of small and full-size models for the tests of `plan`: configurations alone, no weights."""

import json
from pathlib import Path
from typing import Any

from phi3_jax.config.model import Phi3Config
from phi3_jax.config.run import RunConfig

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
