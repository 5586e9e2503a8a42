"""What opens and ends answers, and what comes of it, in templates of the kinds that other families have."""

import json

import pytest

from phi3_jax.data.chat import ChatTokenizer
from phi3_jax.data.formats import read_row
from phi3_jax.data.markers import common_start
from phi3_jax.system.errors import InputError
from tests.helpers.tokenizers import bytes_tokenizer

TOKENS = ["<|endoftext|>", "<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|return|>", "<|call|>", "<|said|>"]
TOKENS += ["<result>", "</result>", "<think>", "</think>"]
CUE = "{% if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}"
# A channel that the model names, calls that end in their own way and drop the text beside them and every call but the
# first, reasoning of the last turn in a channel of its own, another end for the last answer.
CHANNELS = (
    "{% for t in tools or [] %}{{ '<|start|>tools<|message|>' + t.function.name + '<|end|>' }}{% endfor %}"
    "{% for m in messages %}{% if m.tool_calls %}{{ '<|start|>assistant to=' + m.tool_calls[0].function.name + "
    "'<|channel|>calls<|message|>' + (m.tool_calls[0].function.arguments | tojson) + '<|call|>' }}"
    "{% elif m.role == 'tool' %}{{ '<|start|>tool to=assistant<|message|>' + (m.content | tojson) + '<|end|>' }}"
    "{% elif m.role == 'assistant' %}"
    "{% if loop.last and m.reasoning_content %}{{ '<|start|>assistant<|channel|>thoughts<|message|>' "
    "+ m.reasoning_content + '<|end|>' }}{% endif %}"
    "{{ '<|start|>assistant<|channel|>final<|message|>' + m.content + ('<|return|>' if loop.last else '<|end|>') }}"
    "{% else %}{{ '<|start|>' + m.role + '<|message|>' + m.content + '<|end|>' }}{% endif %}{% endfor %}" + CUE
)
# Results of tools within the assistant's turn, which goes on behind them.
WITHIN = (
    "{% for m in messages %}{% if m.role == 'tool' %}{{ '<result>' + m.content + '</result>' }}"
    "{% else %}{% if m.role == 'user' or messages[loop.index0 - 1].role != 'tool' %}{{ '<|start|>' + m.role }}"
    "{% endif %}{{ m.content or '' }}{% for c in m.tool_calls or [] %}{{ '<|channel|>' + c.function.name + "
    "(c.function.arguments | tojson) + '<|call|>' }}{% endfor %}"
    "{% if not m.tool_calls %}{{ '<|end|>' }}{% endif %}{% endif %}{% endfor %}"
    + CUE.replace("prompt %}", "prompt and messages[-1].role != 'tool' %}")
)
# Two tokens end every turn, and a third the document.
TWO_ENDS = (
    "{% for m in messages %}{{ '<|start|>' + m.role + '<|message|>' + m.content + "
    "('<|said|>' if m.role == 'assistant' else '') + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant<|message|>' }}{% else %}{{ eos_token }}{% endif %}"
)
# Reasoning before every answer, empty where there is none; and every text in capitals.
THINKING = (
    "{% for m in messages %}{{ '<|start|>' + m.role }}{% if m.role == 'assistant' %}"
    "{% set parts = m.content.split('</think>') %}{{ '<think>' + (parts[0].split('<think>')[-1] if parts | length > 1 "
    "else '') + '</think>' + parts[-1] }}{% else %}{{ m.content | upper }}{% endif %}{{ '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant<think>' }}{% endif %}"
)
ASK, ANSWER, RESULT = ({"role": role, "content": role[0]} for role in ("user", "assistant", "tool"))


def call(*arguments, content=None):
    calls = [{"type": "function", "function": {"name": "f", "arguments": given}} for given in arguments]
    return {"role": "assistant", "content": content, "tool_calls": calls}


def chat_of(template):
    return ChatTokenizer(bytes_tokenizer(template, [(token, True, False) for token in TOKENS]))


def targets(template, *messages, **columns):
    chat = chat_of(template)
    document = chat.render(read_row({"messages": list(messages), **columns}, "row 1"), "row 1")
    return [chat._control.shown(document.text[span.start : span.end]) for span in document.spans], document


def test_what_a_prompt_does_not_end_with_is_the_models_to_say():
    said, _ = targets(CHANNELS, ASK, ANSWER, ASK, {**ANSWER, "reasoning_content": "r"})
    assert said == [
        "<|channel|>final<|message|>a<|end|>",
        "<|channel|>thoughts<|message|>r<|end|><|start|>assistant<|channel|>final<|message|>a<|return|>",
    ]
    assert targets(TWO_ENDS, ASK, ANSWER, ASK, ANSWER)[0] == ["a<|said|><|end|>"] * 2


@pytest.mark.parametrize("arguments", [{"x": "1"}, {"x": 1}, {}])
def test_calls_end_as_the_template_ends_them(arguments):
    written = json.dumps(arguments)
    tools = [{"type": "function", "function": {"name": "f"}}]
    said, _ = targets(CHANNELS, ASK, call(arguments), RESULT, ANSWER, tools=tools)
    assert said == [f" to=f<|channel|>calls<|message|>{written}<|call|>", "<|channel|>final<|message|>a<|return|>"]
    assert targets(CHANNELS, ASK, call(arguments))[0] == said[:1]


def test_no_result_of_a_tool_is_a_target_within_the_assistants_turn():
    said, document = targets(WITHIN, ASK, call({"x": 1}), RESULT, {**RESULT, "content": "a"}, ANSWER)
    assert said == ['<|channel|>f{"x": 1}<|call|>', "a<|end|>"]
    assert document.answer.content == "a"


@pytest.mark.parametrize("arguments", [{"x": 1}, {}])
def test_turns_without_a_text_are_told_apart(arguments):
    blank, written = {**RESULT, "content": " "}, json.dumps(arguments)
    said, _ = targets(CHANNELS, ASK, call(arguments), blank, call(arguments), RESULT, ANSWER)
    assert said[:2] == [f" to=f<|channel|>calls<|message|>{written}<|call|>"] * 2
    said, _ = targets(WITHIN, ASK, call(arguments), blank, call(arguments), RESULT, ANSWER)
    assert said == [f"<|channel|>f{written}<|call|>"] * 2 + ["a<|end|>"]


def test_calls_without_a_function_around_them_get_one_where_the_template_wants_it():
    flat = {**call({}), "tool_calls": [{"name": "f", "arguments": {"x": "1"}}]}
    said, document = targets(CHANNELS, ASK, flat)
    assert said == [' to=f<|channel|>calls<|message|>{"x": "1"}<|call|>']
    assert any("handed over as {type: function" in remark for remark in document.remarks)


def test_reasoning_that_is_blank_need_not_be_shown():
    assert targets(CHANNELS, ASK, {**ANSWER, "reasoning_content": ""}, ASK, ANSWER)[0][0].endswith("a<|end|>")


def test_reasoning_that_is_empty_opens_no_turn():
    said, document = targets(THINKING, ASK, ANSWER, ASK, {**ANSWER, "content": "<think>r</think>b"})
    assert said == ["<think></think>a<|end|>", "<think>r</think>b<|end|>"]
    assert not document.is_literal


@pytest.mark.parametrize(
    ("message", "fault"),
    [
        (call({"x": "1"}, {"x": "2"}), r"row 1: has tool_calls \(turn 2, call 2\), which .* does not show"),
        (call({"x": "1"}, content="because"), "row 1, turn 2: the chat template has no place for the text of a turn"),
    ],
)
def test_what_stands_beside_a_call_and_is_dropped_is_named(message, fault):
    with pytest.raises(InputError, match=fault):
        targets(CHANNELS, ASK, message, RESULT, ANSWER)


def test_a_template_that_takes_contents_in_parts_alone_is_told():
    parts = (
        "{% for m in messages %}{{ m.role }}{% for p in m.content %}{{ p.text }}{% endfor %}{{ '<|end|>' }}{% endfor %}"
    )
    with pytest.raises(InputError, match="row 1, turn 1: the chat template has no place for any content that is text"):
        targets(parts, ASK, ANSWER)


def test_reasoning_of_an_earlier_turn_alone_is_left_out_and_told():
    thought = {**ANSWER, "reasoning_content": "r"}
    said, document = targets(CHANNELS, ASK, thought, ASK, ANSWER)
    assert said[0] == "<|channel|>final<|message|>a<|end|>"
    assert document.remarks == ("the chat template leaves reasoning_content of earlier turns out",)
    asked = read_row({"messages": [ASK, thought, ASK]}, "row 1")
    chat = chat_of(CHANNELS)
    assert chat._tokenizer.decode(chat.prompt(asked.turns)).endswith(
        "<|start|>user<|message|>u<|end|><|start|>assistant"
    )


def test_the_common_start_of_texts():
    assert common_start(["abc", "abd", "ab"]) == "ab"
    assert common_start(["x", "y"]) == ""
