"""Answers as text while they come."""

from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Int
from numpy import ndarray

from phi3_jax.config.generation import GenerationConfig
from phi3_jax.data.tokenizer import Tokenizer
from phi3_jax.generation.decode import answers
from phi3_jax.generation.stop import StopStrings
from phi3_jax.generation.text import Answer, answers_of, check_prompt
from phi3_jax.generation.tokens import decode, fallback_bytes, special_ids
from phi3_jax.lora import Lora
from phi3_jax.model.phi3 import Phi3ForCausalLM
from phi3_jax.system.errors import InputError


class Detokenizer:
    """Text from tokens one by one. What `push` gave never changes; with `finish` it is the text of all tokens
    together, special ones left out, as the tokenizer decodes them at once.

    A character is held back until its last byte is there. Sentencepiece's bytes (`<0xE2>`) are held back
    until another token follows: one invalid byte among them changes how all of them are decoded.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._special = special_ids(tokenizer)
        self._bytes = fallback_bytes(tokenizer)
        # Tokens given out already that stand before those that are not: a blank in front is dropped only
        # at the start of a text, which the others are then not.
        self._before: list[int] = []
        self._pending: list[int] = []

    def push(self, token: int) -> str:
        """The text that is certain with this token and was not before."""
        if token in self._special:
            return ""
        self._pending.append(token)
        if token in self._bytes:
            return ""
        text = self._text()
        if not text or text.endswith("\ufffd"):
            return ""
        self._before, self._pending = self._pending, []
        return text

    def finish(self) -> str:
        """What was held back; no token follows."""
        text = self._text()
        self._before, self._pending = self._pending, []
        return text

    def _text(self) -> str:
        before = decode(self._tokenizer, self._before)
        return decode(self._tokenizer, [*self._before, *self._pending])[len(before) :]


class TextStream:
    """Writes the answer to one prompt while it comes; a `Watch` of `generate`.

    Nothing is written that a stop string may still take away.

    Args:
        tokenizer: What made the tokens.
        write: Called with each new piece of text.
        prompt: Its tokens.
        settings: Whose end tokens and stop strings end the answer.
    """

    def __init__(
        self, tokenizer: Tokenizer, write: Callable[[str], None], *, prompt: Sequence[int], settings: GenerationConfig
    ) -> None:
        self._write = write
        self._ends = frozenset(settings.eos_token_id)
        self._stops = StopStrings(tokenizer, settings.stop_strings, [prompt])
        self._detokenizer = Detokenizer(tokenizer)
        self._held: list[int] = []
        self._has_ended = False
        self._written = 0

    def __call__(self, new: Int[ndarray, "1 chunk"]) -> None:
        for token in new[0].tolist():
            if not self._has_ended:
                self._take(token)

    def finish(self) -> None:
        """Writes what was held back; no token follows."""
        if self._stops.has_ended(0):
            self._put(self._stops.text(0)[self._written :])
            return
        for token in self._held:
            self._put(self._detokenizer.push(token))
        self._put(self._detokenizer.finish())

    def _take(self, token: int) -> None:
        if token in self._ends:
            self._has_ended = True
            return
        self._stops(np.array([[token]]))
        self._has_ended = self._stops.has_ended(0)
        if self._has_ended:
            return
        self._held.append(token)
        while len(self._held) > self._stops.open_tokens(0):
            self._put(self._detokenizer.push(self._held.pop(0)))

    def _put(self, text: str) -> None:
        if text:
            self._written += len(text)
            self._write(text)


def stream_answer(
    model: Phi3ForCausalLM,
    tokenizer: Tokenizer,
    prompt: Sequence[int],
    write: Callable[[str], None],
    *,
    lora: Lora | None = None,
    settings: GenerationConfig,
    is_stopped: Callable[[], bool] = lambda: False,
) -> Answer:
    """Answers one prompt and writes the answer while it comes: the pieces together are its text.

    A beam search knows its answer only at the end, and it is written then.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        prompt: The tokens of the prompt.
        write: Called with each new piece of text.
        lora: The adapter.
        settings: How to answer, as for `answer_prompts`.
        is_stopped: Asked every few tokens; once it says so, the answer ends with what it has.

    Raises:
        InputError: As `answer_prompts` does, and for `num_return_sequences` above 1.
    """
    check_prompt(prompt, "the prompt", model.config, settings, tokenizer)
    if settings.num_return_sequences > 1:
        raise InputError(
            f"num_return_sequences is {settings.num_return_sequences}, but only one answer can be streamed; set it to 1"
        )
    stream = TextStream(tokenizer, write, prompt=prompt, settings=settings)

    def watch(new: Int[ndarray, "1 chunk"]) -> Int[ndarray, "1"] | None:
        stream(new)
        return np.array([new.shape[1]]) if is_stopped() else None

    is_beam = settings.num_beams > 1
    ids = np.array([prompt], np.int32)
    out = answers(model, ids, None, lora, settings, tokenizer, None if is_beam else watch)
    (answer,) = answers_of(out, tokenizer, [prompt], settings)
    if is_beam:
        write(answer.text)
    else:
        stream.finish()
    return answer
