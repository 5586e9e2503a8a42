"""Spans: where they lie once control tokens have other names."""

from phi3_jax.data.control_tokens import ControlTokens
from phi3_jax.data.places import Place
from phi3_jax.data.spans import GuardedText, Span
from tests.helpers.tokenizers import JULY, phi3_tokenizer


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
