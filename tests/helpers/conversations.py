"""Conversations with a model that answers what it was asked."""

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from phi3_jax.chat import session as session_module
from phi3_jax.chat.session import Session
from phi3_jax.config.generation import GenerationConfig
from phi3_jax.demo import demo_path
from phi3_jax.generation.text import Answer
from phi3_jax.hf.tokenizer import load_tokenizer

TOKENIZER = load_tokenizer(demo_path("base"))


class Model:
    """Stands in for a model: says the number of its answer, and keeps what it was asked."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, positions: int) -> None:
        self.config = SimpleNamespace(max_position_embeddings=positions, vocab_size=len(TOKENIZER))
        self.asked: list[SimpleNamespace] = []
        self.ends_early: Callable[[], bool] = lambda: False
        monkeypatch.setattr(session_module, "stream_answer", self.answer)
        monkeypatch.setattr(session_module, "answer_with_each", self.answer_each)

    def answer(self, model: Any, tokenizer: Any, prompt: list[int], write: Any, **given: Any) -> Answer:
        self.asked.append(SimpleNamespace(text=tokenizer.decode(prompt), tokens=len(prompt), **given))
        text = "" if self.ends_early() else f"answer {len(self.asked)}"
        write(text)
        return Answer(text, (1, 2), (0.0, 0.0), "stop")

    def answer_each(self, model: Any, tokenizer: Any, prompts: Any, adapters: Any, **given: Any) -> Iterator[Any]:
        for name in reversed(adapters):
            text = f"{name} to {tokenizer.decode(prompts[0])}"
            yield 0, name, Answer(text, (), (), "stop")


def start(model: Model, tokenizer: Any = TOKENIZER, **given: Any) -> Session:
    notices: list[str] = []
    session = Session(
        model, tokenizer, GenerationConfig(max_new_tokens=20), load=lambda path: path, notice=notices.append, **given
    )
    session.notices = notices
    return session


def silent(text: str) -> None:
    pass
