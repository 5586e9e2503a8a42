"""Which tokens stand for a part of a text."""

import random

import numpy as np
import pytest

from phi3_jax.data import chat as chats
from phi3_jax.data.chat import ChatTokenizer
from phi3_jax.data.encoded import Encoded
from phi3_jax.data.spans import Rendered, Span
from tests.helpers.tokenizers import templates

PIECES = [
    "the hen",
    " ",
    "  ",
    "\n",
    "ä",
    "🐔",
    "e\u0301",
    "\u200b",
    "12",
    "<|end|>",
    "<|user|>",
    "<|endoftext|>",
    "</s>",
    "ﬁ",
]


@pytest.fixture(autouse=True)
def by_characters(monkeypatch):
    """Spans are looked up by their characters, whatever control tokens stand around them."""
    monkeypatch.setattr(chats, "delimiters", lambda *_: None)


def by_offsets(encoded: Encoded, span: Span) -> list[int]:
    """The tokens of a span, by its definition."""
    starts, ends = np.array(encoded.encoding.offsets).reshape(-1, 2).T
    special = encoded.special[encoded.added :]
    touching = (starts < span.end) & (ends > span.start)
    if not span.is_exact:
        touching &= ~(special & (starts < span.start))
    return (np.flatnonzero(touching) + encoded.added).tolist()


@pytest.mark.parametrize("name", ["april", "july with add_bos_token", "phi-4", "phi-4-mini"])
def test_spans_of_any_text_hold_the_tokens_of_their_characters(name):
    chat, rng = ChatTokenizer(templates()[name]), random.Random(0)
    for number in range(60):
        text = chat._control.named("".join(rng.choices(PIECES, k=rng.randint(1, 12))))
        [encoded] = chat.encode([Rendered("x", text, (), wants_bos=number % 2 == 0)])
        for _ in range(60):
            start, end = sorted(rng.choices(range(len(text) + 1), k=2))
            span = Span(start, end, "", trained=True, is_exact=rng.random() < 0.3)
            first, last = encoded.covered_by(span)
            assert list(range(first, last)) == by_offsets(encoded, span), (text, span)


class Covering:
    """What the tokenizers library tells of three tokens that cover these characters."""

    offsets = ((0, 3), (3, 5), (5, 8))

    def __len__(self) -> int:
        return 3

    def char_to_token(self, character: int) -> int | None:
        return next((token for token, (start, end) in enumerate(self.offsets) if start <= character < end), None)

    def token_to_chars(self, token: int) -> tuple[int, int]:
        return self.offsets[token]


@pytest.mark.parametrize("added", [0, 1])
def test_a_token_that_begins_before_a_span_is_covered_unless_it_is_a_control_token(added):
    special = np.array([*[True] * added, True, False, True])
    encoded = Encoded(np.arange(3 + added), special, Covering(), added)
    assert encoded.covered_by(Span(4, 8, "", True)) == (1 + added, 3 + added)
    assert encoded.covered_by(Span(2, 4, "", True)) == (1 + added, 2 + added)
    # A template's own mark covers what transformers' mask does.
    assert encoded.covered_by(Span(2, 4, "", True, is_exact=True)) == (added, 2 + added)
    assert encoded.covered_by(Span(6, 8, "", True, is_exact=True)) == (2 + added, 3 + added)


def test_a_text_without_tokens():
    chat = ChatTokenizer(templates()["phi-4"])
    [encoded] = chat.encode([Rendered("x", "", ())])
    assert encoded.covered_by(Span(0, 0, "", trained=True)) == (0, 0)
