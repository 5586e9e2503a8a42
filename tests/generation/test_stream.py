"""Text from tokens as they come: equal to decoding them all at once, and never taken back."""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from phi3_jax.config.generation import GenerationConfig
from phi3_jax.demo import demo_path
from phi3_jax.generation.stream import Detokenizer, TextStream
from phi3_jax.hf.tokenizer import load_tokenizer
from tests.helpers.tokenizers import JULY, PHI_4, phi3_tokenizer, phi4_tokenizer

REAL = (
    "models/phi-3-mini-4k-instruct",
    pytest.param("models/phi-3.5-mini-instruct", marks=pytest.mark.slow),  # takes seconds to load
    "checkpoints/stories260K",
)
TEXTS = (
    "",
    " leading and  double blanks ",
    "Hi 👩‍👩‍👧‍👦! 😀😀\n\n中文字符,日本語 ไทย",
    "def f(x):\n\treturn x  # é\n    \n",
    "�real replacement�",
    "<|end|>text<|assistant|> more",
)

sentencepiece = cache(lambda: phi3_tokenizer(JULY))
byte_level = cache(lambda: phi4_tokenizer(PHI_4))
demo = cache(lambda: load_tokenizer(demo_path("base")))
OURS = pytest.mark.parametrize("make", [sentencepiece, byte_level, demo], ids=["sentencepiece", "byte-level", "demo"])
# Half of the ids from the start of the vocabulary, where single bytes and special tokens are.
IDS = st.lists(st.one_of(st.integers(0, 265), st.integers(0, 10**6)), max_size=24)


def check(tokenizer: Any, ids: list[int]) -> None:
    stream = Detokenizer(tokenizer)
    pieces = [stream.push(token) for token in ids]
    assert "".join(pieces) + stream.finish() == tokenizer.decode(ids, skip_special_tokens=True)


@OURS
@pytest.mark.parametrize("text", TEXTS)
def test_texts(make: Callable[[], Any], text: str) -> None:
    check(make(), make()(text)["input_ids"])


@OURS
@settings(max_examples=150, deadline=None)
@given(ids=IDS)
def test_any_tokens(make: Callable[[], Any], ids: list[int]) -> None:
    check(make(), [index % len(make()) for index in ids])


@pytest.mark.parametrize("folder", REAL)
def test_real_tokenizers(folder: str, testdata: Path) -> None:
    tokenizer = load_tokenizer(testdata / folder)
    for text in TEXTS:
        check(tokenizer, tokenizer(text)["input_ids"])
    rng = np.random.default_rng(0)
    for _ in range(100):
        low, high = rng.integers(0, 300, 12), rng.integers(0, len(tokenizer), 12)
        check(tokenizer, rng.permutation([*low, *high]).tolist())


def test_words_come_as_soon_as_they_are_certain() -> None:
    tokenizer = demo()
    stream, words = Detokenizer(tokenizer), []
    for token in tokenizer("two red mugs")["input_ids"]:
        words.append(stream.push(token))
    assert "".join(words) == "two red mugs"
    assert len([word for word in words if word]) > 2


def test_a_character_comes_whole_with_its_last_byte() -> None:
    tokenizer = byte_level()
    stream = Detokenizer(tokenizer)
    ids = tokenizer("é😀")["input_ids"]
    assert [stream.push(token) for token in ids] == ["", "é", "", "", "", "😀"]


def pieces(tokenizer: Any, text: str, **settings: Any) -> list[str]:
    """What is written of an answer that comes one token at a time."""
    written: list[str] = []
    stream = TextStream(tokenizer, written.append, prompt=[], settings=GenerationConfig(**settings))
    for token in tokenizer(text, add_special_tokens=False)["input_ids"]:
        stream(np.array([[token]]))
    stream.finish()
    return written


@pytest.mark.parametrize("tokenizer", [sentencepiece(), byte_level()], ids=["sentencepiece", "byte-level"])
def test_nothing_of_a_stop_string_is_written(tokenizer: Any) -> None:
    assert "".join(pieces(tokenizer, "ab STO STOP more", stop_strings=("STOP",))) == "ab STO "
    # What only began like one is written in the end.
    assert "".join(pieces(tokenizer, "ab STO", stop_strings=("STOP",))) == "ab STO"
    assert "".join(pieces(tokenizer, "é\n\n😀!", stop_strings=("\n\n😀",))) == "é"


def test_writing_ends_at_the_end_token() -> None:
    tokenizer = byte_level()
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert "".join(pieces(tokenizer, "yes<|im_end|>no", eos_token_id=(end,))) == "yes"
    assert "".join(pieces(tokenizer, "yes<|im_end|>no")) == "yesno"
