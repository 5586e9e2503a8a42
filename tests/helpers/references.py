"""What the parity tests compare with: random tiny Phi-3 models of transformers; and how they compare."""

from pathlib import Path
from typing import Any

import numpy as np
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


SMALL = {"num_key_value_heads": 2, "pad_token_id": 5}

IDS = np.array([[1, 17, 5, 98, 33, 64, 5, 3], [44, 45, 2, 90, 11, 11, 70, 8]])

EVERYTHING = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj", "lm_head", "embed_tokens"]


def torch_base(folder, dtype=torch.float32):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager").eval()


def torch_logits(model, ids=IDS, **kwargs):
    with torch.no_grad():
        return model(torch.tensor(ids), use_cache=False, **kwargs).logits.float().numpy()


def assert_close(ours, theirs, rtol=1e-5):
    """The largest difference, relative to the largest number."""
    ours, theirs = np.asarray(ours, np.float32), np.asarray(theirs, np.float32)
    assert ours.shape == theirs.shape
    assert np.abs(ours - theirs).max() <= rtol * np.abs(theirs).max()


def assert_near(ours, theirs, rtol=1e-5):
    """The distance, relative to the length: of gradients, whose single entries are sums that nearly cancel."""
    ours, theirs = np.asarray(ours, np.float32), np.asarray(theirs, np.float32)
    assert ours.shape == theirs.shape
    assert np.linalg.norm(ours - theirs) <= rtol * np.linalg.norm(theirs)


def assert_different(a, b):
    a, b = np.asarray(a), np.asarray(b)
    assert np.abs(a - b).max() > 0.05 * np.abs(b).max()
