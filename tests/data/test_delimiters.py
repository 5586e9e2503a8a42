"""Spans between control tokens hold the tokens that their characters say."""

import dataclasses
import random

import pytest

from phi3_jax.data import chat as chats
from phi3_jax.data.chat import ChatTokenizer
from phi3_jax.data.control_tokens import ControlTokens
from phi3_jax.data.delimiters import delimiters
from phi3_jax.data.formats import read_row
from phi3_jax.data.spans import Rendered, Span
from tests.helpers.tokenizers import JULY, phi3_tokenizer, templates

TEXTS = ["the hen", " 12", "12 \n", "\n the", "ä🐔", "a <|end|> b", "</s>", "  ", "the\u200b"]


@pytest.mark.parametrize("name", templates())
def test_tokens_are_those_of_the_characters(name, monkeypatch):
    chat, rng = ChatTokenizer(templates()[name]), random.Random(0)
    documents = []
    for number in range(40):
        turns = [{"role": "system", "content": rng.choice(TEXTS)}] if rng.random() < 0.3 else []
        for _ in range(rng.randint(1, 3)):
            turns.append({"role": "user", "content": "".join(rng.choices(TEXTS, k=2))})
            turns.append({"role": "assistant", "content": "x" + "".join(rng.choices(TEXTS, k=rng.randint(0, 4)))})
        try:
            document = chat.render(read_row({"messages": turns}, "row 1"), "row 1")
        except chats.InputError:  # some templates take no system turns
            continue
        documents.append(dataclasses.replace(document, wants_bos=number % 2 == 0))
    by_delimiters = chat.encode(documents)
    monkeypatch.setattr(chats, "delimiters", lambda *_: None)
    by_characters = chat.encode(documents)
    for document, one, other in zip(documents, by_delimiters, by_characters, strict=True):
        assert one.ids.tolist() == other.ids.tolist()
        for span in (*document.spans, document.answer):
            assert one.covered_by(span) == other.covered_by(span), (document.text, span)
    if name in ("april", "july", "phi-3.5", "phi-4", "phi-4-mini"):  # and are not looked up by characters in silence
        assert sum(each.delimiters is not None for each in by_delimiters) > 0.9 * len(documents) > 20


@pytest.fixture(scope="module")
def control():
    return ControlTokens(phi3_tokenizer(JULY))


@pytest.mark.parametrize(
    ("before", "content", "behind", "is_told"),
    [
        ("<|assistant|>", "a b", "<|end|>", True),
        ("<|assistant|>\n", "a b", "<|end|>", True),  # which the token takes, as `rstrip` says
        ("<s>", "a b", "<|end|>", True),
        ("<s>\n", "a b", "<|end|>", False),
        ("<|assistant|>x", "a b", "<|end|>", False),
        ("", "a b", "<|end|>", False),
        ("<|assistant|>", "a b", "", False),
        ("<|assistant|>\u2003", "a b", "<|end|>", False),  # of which readers may think differently
    ],
)
def test_which_spans_control_tokens_tell(control, before, content, behind, is_told):
    before, text = control.named(before), control.named(before + content + behind)
    span = Span(len(before), len(text), content, trained=True)
    document = Rendered("row 1", text, (), answer=span)
    assert (delimiters(document, control) is not None) == is_told
    exact = dataclasses.replace(span, is_exact=True)
    assert delimiters(Rendered("row 1", text, (exact,)), control) is None


def test_tokens_that_are_only_whole_words_are_not_counted():
    from tokenizers import AddedToken

    tokenizer = phi3_tokenizer(JULY)
    assert ControlTokens(tokenizer).can_be_counted
    tokenizer.add_tokens([AddedToken("<|word|>", single_word=True, special=True)])
    assert not ControlTokens(tokenizer).can_be_counted
