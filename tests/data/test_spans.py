"""Spans: which tokens they cover, and where they lie once control tokens have other names."""

import numpy as np

from phi3_jax.data.control_tokens import ControlTokens
from phi3_jax.data.places import Place
from phi3_jax.data.spans import Encoded, GuardedText, Span
from tests.helpers.tokenizers import JULY, phi3_tokenizer


def test_a_token_that_begins_before_a_span_is_covered_unless_it_is_a_control_token():
    starts, ends = np.array([0, 3, 5]), np.array([3, 5, 8])
    encoded = Encoded(np.array([7, 8, 9]), starts, ends, np.array([True, False, True]))
    assert encoded.covered_by(Span(4, 8, "", True)).tolist() == [False, True, True]
    assert encoded.covered_by(Span(2, 4, "", True)).tolist() == [False, True, False]
    # A template's own mark covers what transformers' mask does.
    assert encoded.covered_by(Span(2, 4, "", True, is_exact=True)).tolist() == [True, True, False]
    assert encoded.first(Span(6, 8, "", True, is_exact=True)) == 2


def test_spans_move_with_the_names_and_tell_what_decodes():
    control = ControlTokens(phi3_tokenizer(JULY))
    control.set_of_turns(["<|end|>"])
    said = control.guarded("a</s><|system|><|end|>", is_literal=False)  # the last of them stays text
    guarded = f"<|assistant|>{said}<|end|><|endoftext|>"
    text = GuardedText(control, guarded)
    start, end = len("<|assistant|>"), len("<|assistant|>") + len(said)
    span = text.span(Place(start, end, end + len("<|end|>")), trained=True)
    assert control.shown(text.named[span.start : span.end]) == "a</s><|system|><|end|><|end|>"
    assert span.content == "a</s><|end|>"  # as decoded without special tokens, of which `</s>` is none
    [eos] = text.eos("<|endoftext|>", span)
    assert control.shown(text.named[eos.start : eos.end]) == "<|endoftext|>"
    assert text.eos("<|endoftext|>", Span(0, span.start, "", True)) == []
