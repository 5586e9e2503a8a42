"""Random tiny Phi-3 checkpoints made by transformers: what the parity tests compare with."""

from pathlib import Path
from typing import Any

import torch
import transformers

TINY: dict[str, Any] = {
    "vocab_size": 99,
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 64,
    "original_max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    # Ten times the usual spread: attention that is not uniform, logits that are not all alike.
    "initializer_range": 0.2,
}


def longrope(pairs: int, original: int = 16, maximum: int = 64) -> dict[str, Any]:
    """Configuration entries of a LongRoPE model whose factor sets differ in every dimension."""
    return {
        "max_position_embeddings": maximum,
        "original_max_position_embeddings": original,
        "rope_scaling": {
            "type": "longrope",
            "short_factor": [1.0 + 0.1 * i for i in range(pairs)],
            "long_factor": [1.5 + 0.9 * i for i in range(pairs)],
        },
    }


def torch_phi3(folder: Path | None = None, *, seed: int = 0, **overrides: Any) -> transformers.Phi3ForCausalLM:
    """A random float32 model in evaluation mode, saved to `folder` where one is given."""
    torch.manual_seed(seed)
    config = transformers.Phi3Config(**{**TINY, **overrides})
    config._attn_implementation = "eager"
    model = transformers.Phi3ForCausalLM(config).eval()
    with torch.no_grad():  # norms that are all ones would hide a forgotten weight
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
    if folder is not None:
        model.save_pretrained(folder)
    return model
