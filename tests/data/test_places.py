"""Where turns begin and end: by tokens, by taking the text apart, by the template's own marks."""

import pytest

from phi3_jax.data.chat import ChatTokenizer
from phi3_jax.data.formats import Conversation, Prerendered, Turn, read_row
from phi3_jax.system.errors import InputError
from tests.helpers.tokenizers import JULY, PHI_3_TOKENS, phi4_tokenizer

CHATML = (
    "{% for m in messages %}{% set text = m.content.split('</think>')[-1] if m.role == 'assistant' and not loop.last "
    "else m.content %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' and loop.last "
    "and '</think>' not in text %}{{ '<think></think>' }}{% endif %}{{ text + '<|im_end|>\n' }}{% endfor %}"
)
PLAIN = "{% for m in messages %}{{ '### ' + m.role + '\n' + m.content + '<|end|>\n' }}{% endfor %}"
MARKED = (
    "{% for m in messages %}{{ '<|' + m.role + '|>' }}{% if m.role == 'assistant' %}{% generation %}"
    "{{ m.content + '<|end|>' }}{% endgeneration %}{% else %}{{ m.content + '<|end|>' }}{% endif %}{% endfor %}"
)
MARKERS = [*PHI_3_TOKENS, "<|im_start|>", "<|im_end|>", "<think>", "</think>"]


def targets(template, example, **settings):
    chat = ChatTokenizer(phi4_tokenizer(template, markers=MARKERS), **settings)
    example = Conversation(example) if isinstance(example, tuple) else example
    document = chat.render(example, "row 1")
    return [chat._control.shown(document.text[span.start : span.end]) for span in document.spans if span.trained]


def turns(*contents):
    return tuple(Turn(("user", "assistant")[index % 2], text) for index, text in enumerate(contents))


def test_a_turn_runs_from_its_opening_whatever_a_template_does_with_its_reasoning():
    # The reasoning of the first answer is left out, an empty one put before the last.
    assert targets(CHATML, turns("u", "<think>r</think>a", "v", "b")) == ["a<|im_end|>", "<think></think>b<|im_end|>"]
    assert targets(CHATML, turns("u", "<think>r</think>a")) == ["<think>r</think>a<|im_end|>"]


def test_openings_without_control_tokens():
    assert targets(PLAIN, turns("### assistant\nu", "a", "v", "b")) == ["a<|end|>", "b<|end|>"]


def test_pre_rendered_turns_run_to_their_own_end():
    text = "<|user|>u<|end|><|assistant|><think>r</think>a<|end|><|user|>v<|end|><|assistant|>b<|user|>w<|end|>"
    template = JULY.replace("\n", "")
    # The second is not closed: it ends where the next turn opens.
    assert targets(template, Prerendered(text)) == ["<think>r</think>a<|end|>", "b"]


def test_a_templates_own_marks_are_the_targets():
    assert targets(MARKED, turns("u", "a", "v", "b")) == ["a<|end|>", "b<|end|>"]
    off = (*turns("u"), Turn("assistant", "a", trained=False), *turns("v", "b"))
    assert targets(MARKED, off) == ["b<|end|>"]


def test_a_conversational_completion_is_a_target_as_a_whole():
    say = [{"role": role, "content": role[0]} for role in ("user", "assistant", "user", "assistant")]
    row = read_row({"prompt": say[:1], "completion": say[1:]}, "row 1")
    template = JULY.replace("\n", "")
    assert targets(template, row) == ["a<|end|><|user|>u<|end|><|assistant|>a<|end|>"]
    assert targets(template, row, final_eos=True)[-1] == "<|endoftext|>"
    flagged = read_row({"prompt": say[:1], "completion": [say[1], say[2], {**say[3], "loss": False}]}, "row 1")
    assert targets(template, flagged) == ["a<|end|><|user|>u<|end|><|assistant|>"]
    with pytest.raises(InputError, match="row 1: the completion begins with user"):
        read_row({"prompt": say[:1], "completion": say[2:]}, "row 1")


def test_strings_are_taken_as_they_are_where_they_are_rendered_or_meant_so():
    template = JULY.replace("\n", "")
    done = read_row({"prompt": "<|user|>u<|end|><|assistant|>", "completion": "a<|end|>"}, "row 1")
    assert targets(template, done) == ["a<|end|>"]
    assert targets(template, done, final_eos=True) == ["a<|end|><|endoftext|>"]
    plain = read_row({"prompt": "The sky is", "completion": " blue."}, "row 1")
    assert targets(template, plain) == [" blue.<|end|>"]
    assert targets(template, plain, takes_strings=True) == [" blue.<|endoftext|>"]
    asked = read_row({"prompt": "What is <|end|>?", "completion": "A token."}, "row 1")
    assert targets(template, asked) == ["A token.<|end|>"]
