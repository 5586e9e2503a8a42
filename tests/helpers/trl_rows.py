"""Rows of each kind that TRL's SFTTrainer takes, drawn."""

from typing import Any

import numpy as np

WORDS = ["hen", "the 12", "a", "an egg", "one", "two\n", "42"]


def words(rng: np.random.Generator) -> str:
    return " ".join(rng.choice(WORDS, rng.integers(2, 6))).strip()


def user(rng: np.random.Generator) -> dict[str, Any]:
    return {"role": "user", "content": words(rng)}


def answer(rng: np.random.Generator) -> dict[str, Any]:
    return {"role": "assistant", "content": words(rng)}


def messages(rng: np.random.Generator) -> dict[str, Any]:
    system = {"role": "system", "content": words(rng)}
    return {"messages": [system, user(rng), answer(rng), user(rng), answer(rng)]}


def strings(rng: np.random.Generator) -> dict[str, Any]:
    return {"prompt": words(rng), "completion": f" {words(rng)}"}


def rendered_strings(rng: np.random.Generator) -> dict[str, Any]:
    prompt = f"<|user|>\n{words(rng)}<|end|>\n<|assistant|>\n"
    return {"prompt": prompt, "completion": f"{words(rng)}<|end|>"}


def turns(rng: np.random.Generator) -> dict[str, Any]:
    return {"prompt": [user(rng)], "completion": [answer(rng)]}


def several_turns(rng: np.random.Generator) -> dict[str, Any]:
    return {"prompt": [user(rng), answer(rng), user(rng)], "completion": [answer(rng), user(rng), answer(rng)]}


def text(rng: np.random.Generator) -> dict[str, Any]:
    return {"text": f"<|user|>\n{words(rng)}<|end|>\n<|assistant|>\n{words(rng)}<|end|>\n"}


def plain_text(rng: np.random.Generator) -> dict[str, Any]:
    return {"text": words(rng)}


def ids(rng: np.random.Generator) -> list[int]:
    return rng.integers(260, 350, rng.integers(8, 30)).tolist()


def tokenised(rng: np.random.Generator) -> dict[str, Any]:
    return {"input_ids": ids(rng)}


def labelled(rng: np.random.Generator) -> dict[str, Any]:
    given = ids(rng)
    start = len(given) // 2
    return {"input_ids": given, "labels": [-100] * start + given[start:]}


def masked(name: str) -> Any:
    def row(rng: np.random.Generator) -> dict[str, Any]:
        given = ids(rng)
        mask = (rng.random(len(given)) < 0.5).astype(int)
        mask[1] = 1
        return {"input_ids": given, name: mask.tolist()}

    return row


def tools(rng: np.random.Generator) -> dict[str, Any]:
    definition = {"type": "function", "function": {"name": "f", "description": words(rng), "parameters": {}}}
    call = {"type": "function", "function": {"name": "f", "arguments": {"a": words(rng)}}}
    calling = {"role": "assistant", "content": words(rng), "tool_calls": [call]}
    return {
        "messages": [user(rng), calling, {"role": "tool", "content": words(rng)}, answer(rng)],
        "tools": [definition],
    }
