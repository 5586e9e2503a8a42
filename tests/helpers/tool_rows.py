"""Rows with tools as OpenAI's fine-tuning takes them, and a tiny model of Phi-4-mini's layout."""

import json
import random
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from flax import nnx

from phi3_jax import Phi3Config, Phi3ForCausalLM
from tests.helpers.tokenizers import phi4_mini_tokenizer

CITIES = ("OSL", "LIM", "PAR", "QTO")
# Each tool with the key of its argument, and ways to ask for it.
TOOLS = {
    "weather": ("city", ("weather {}?", "will it rain, {}?", "how warm, {}?")),
    "time": ("place", ("clock {}?", "what time is it, {}?", "the hour, {}?")),
    "flights": ("to", ("fly me to {}.", "a plane, {}.", "seats {}?")),
}
DEFINITIONS = [
    {"type": "function", "function": {"name": name, "parameters": {key: {}}}} for name, (key, _) in TOOLS.items()
]


def tool_rows(number: int) -> list[dict[str, Any]]:
    """Questions for a city, each by somebody else; every third row goes on to the answer."""
    draw = random.Random(0)
    rows = []
    for index in range(number):
        name, city = draw.choice(list(TOOLS)), draw.choice(CITIES)
        key, questions = TOOLS[name]
        arguments: Any = {key: city}
        call = {
            "id": f"call_{index}",
            "type": "function",
            "function": {"name": name, "arguments": json.dumps(arguments)},
        }
        writer = "".join(draw.choices("abdefghjkmn", k=draw.randint(3, 6))).capitalize()
        messages: list[dict[str, Any]] = [
            {"role": "user", "content": f"{writer} here, {draw.choice(questions).format(city)}"},
            {"role": "assistant", "content": None, "tool_calls": [call]},
        ]
        if index % 3 == 0:
            messages.append({"role": "tool", "tool_call_id": call["id"], "content": '{"ok": true}'})
            messages.append({"role": "assistant", "content": "Done."})
        rows.append({"messages": messages, "tools": DEFINITIONS})
    return rows


def write_tool_rows(folder: Path, number: int = 640, held_out: int = 24) -> tuple[Path, Path]:
    """Files for training and for evaluation, which share no row."""
    rows = tool_rows(number)
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
