"""Folders with a tiny checkpoint."""

from pathlib import Path

import jax
import jax.numpy as jnp
from flax import nnx

from phi3_jax import Phi3Config, Phi3ForCausalLM
from tests.helpers.models import tiny_model
from tests.helpers.tokenizers import tiny_tokenizer

# A config.json.
RAW = {
    "model_type": "phi3",
    "vocab_size": 48,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}

LONGROPE = {
    "max_position_embeddings": 64,
    "original_max_position_embeddings": 16,
    "partial_rotary_factor": 0.5,
    "rope_scaling": {"type": "su", "short_factor": [1.0, 1.5], "long_factor": [2.0, 7.5]},
}

KINDS = {"plain": {}, "tied": {"tie_word_embeddings": True}, "longrope": LONGROPE}


def model_of(overrides=None, *, dtype=jnp.float32, seed=0) -> Phi3ForCausalLM:
    """A random model of `RAW` with other entries, whose norms are random too."""
    config = Phi3Config.from_dict(RAW | (overrides or {}))
    model = Phi3ForCausalLM(config, dtype=dtype, rngs=nnx.Rngs(seed))
    norms = iter(range(100))
    for path, leaf in nnx.to_flat_state(nnx.state(model)):
        if "norm" in path[-2]:  # all ones would hide a norm that is not loaded, or loaded to the wrong place
            leaf.set_value((jax.random.uniform(jax.random.key(next(norms)), leaf.shape) + 0.5).astype(dtype))
    return model


def write_checkpoint(folder: Path, layers: int = 1) -> Path:
    tiny_model(layers, bos_token_id=1, eos_token_id=2).save_pretrained(str(folder))
    tiny_tokenizer().save_pretrained(folder)
    return folder


# A token that the tokenizer of the next checkpoint has, and its model has no row for; and how that is told.
OUTGROWN = {"<call>": 60}
OUTGROWN_ERROR = (
    "token '<call>' has id 60, and the model's embedding has 53 rows (ids 0 to 52), 9 of them without a token: "
    "44 to 52; give the token one of these ids, or resize the embedding"
)


def write_outgrown_checkpoint(folder: Path) -> Path:
    write_checkpoint(folder)
    tiny_tokenizer(OUTGROWN).save_pretrained(folder)
    return folder
