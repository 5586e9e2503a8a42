"""Rows with tools as OpenAI's fine-tuning takes them, and a tiny model of Phi-4-mini's layout."""

import json
import random
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from flax import nnx

from phi3_jax import Phi3Config, Phi3ForCausalLM
from tests.helpers.tokenizers import phi4_mini_tokenizer

CITIES = ("Oslo", "Rome", "Lima", "Paris", "Quito", "Bern")
DAYS = ("today", "Monday", "Friday")
# Each tool with the key of its argument, and ways to ask for it.
TOOLS = {
    "weather": ("city", ("Weather in {} {}?", "Will it rain in {} {}?", "How warm is {} {}?")),
    "time": ("place", ("Clock in {} {}?", "What time is it in {} {}?", "The hour in {} {}?")),
    "flights": ("to", ("Fly me to {} {}.", "A plane to {} {}?", "Seats to {} {}?")),
}


def _definition(name: str, key: str) -> dict[str, Any]:
    parameters = {"properties": {key: {"type": "string"}, "day": {"type": "string"}}}
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


DEFINITIONS = [_definition(name, key) for name, (key, _) in TOOLS.items()]


def tool_rows() -> list[dict[str, Any]]:
    """One for each question, city and day, in a fixed disorder; every third goes on to the answer."""
    rows = []
    for name, (key, questions) in TOOLS.items():
        for question in questions:
            for city in CITIES:
                for day in DAYS:
                    arguments: Any = {key: city, "day": day}
                    call = {
                        "id": f"call_{len(rows)}",
                        "type": "function",
                        "function": {"name": name, "arguments": json.dumps(arguments)},
                    }
                    messages: list[dict[str, Any]] = [
                        {"role": "user", "content": question.format(city, day)},
                        {"role": "assistant", "content": None, "tool_calls": [call]},
                    ]
                    if len(rows) % 3 == 0:
                        messages.append({"role": "tool", "tool_call_id": call["id"], "content": '{"ok": true}'})
                        messages.append({"role": "assistant", "content": f"Done for {city}."})
                    rows.append({"messages": messages, "tools": DEFINITIONS})
    random.Random(0).shuffle(rows)
    return rows


def write_tool_rows(folder: Path, held_out: int = 32) -> tuple[Path, Path]:
    """Files for training and for evaluation, which share no row."""
    rows = tool_rows()
    parts = rows[held_out:], rows[:held_out]
    files = folder / "tools.jsonl", folder / "held_out.jsonl"
    for file, part in zip(files, parts, strict=True):
        file.write_text("".join(json.dumps(row) + "\n" for row in part))
    return files


def write_phi4_mini(folder: Path) -> Path:
    """A random checkpoint: tied embeddings, grouped queries, three quarters of each head rotated, its tokenizer."""
    tokenizer = phi4_mini_tokenizer()
    config = Phi3Config.from_dict(
        {
            "model_type": "phi3",
            "vocab_size": len(tokenizer),
            "hidden_size": 96,
            "intermediate_size": 192,
            "num_hidden_layers": 3,
            "num_attention_heads": 6,
            "num_key_value_heads": 2,
            "partial_rotary_factor": 0.75,
            "tie_word_embeddings": True,
            "max_position_embeddings": 1024,
            "original_max_position_embeddings": 1024,
            "bos_token_id": tokenizer.eos_token_id,
            "eos_token_id": [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|end|>")],
            "pad_token_id": tokenizer.eos_token_id,
        }
    )
    model = Phi3ForCausalLM(config, dtype=jnp.float32, rngs=nnx.Rngs(0))
    scale = model.model.norm.weight
    scale.set_value(10 * scale[...])  # of so few numbers, at the usual spread, no token could become likely
    model.save_pretrained(str(folder))
    tokenizer.save_pretrained(folder)
    return folder
