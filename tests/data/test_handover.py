"""What templates are handed of tools, calls, reasoning and settings: what they show, or an error that names the key."""

import json

import pytest

from phi3_jax.data.chat import ChatTokenizer
from phi3_jax.data.formats import read_row
from phi3_jax.system.errors import InputError
from tests.helpers.tokenizers import JULY, PHI_3_TOKENS, phi3_tokenizer, phi4_mini_tokenizer, phi4_tokenizer

# As most others: tools an argument, calls in JSON, reasoning of the last turn.
OTHERS = (
    "{% if tools %}{{ '<|system|>' + (tools | tojson) + '<|end|>' }}{% endif %}"
    "{% if documents %}{{ documents[0].text }}{% endif %}{% if loud %}!{% endif %}"
    "{% for m in messages %}{{ '<|' + m.role + '|>' }}"
    "{% if m.reasoning_content and loop.last %}{{ '{' + m.reasoning_content + '}' }}{% endif %}"
    "{% if m.name %}{{ m.name + ':' }}{% endif %}"
    "{% if m.tool_calls %}{% for c in m.tool_calls %}{{ c.function.name + (c.function.arguments | tojson) }}"
    "{% endfor %}{% else %}{{ m.content }}{% endif %}{{ '<|end|>' }}{% endfor %}"
)
TOOLS = [{"type": "function", "function": {"name": "f"}}]
ASK, ANSWER = {"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}


def call(arguments):
    return {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"id": "1", "type": "function", "function": {"name": "f", "arguments": arguments}}],
    }


def render(tokenizer, row):
    chat = ChatTokenizer(tokenizer)
    document = chat.render(read_row(row, "row 1"), "row 1")
    ids = chat.encode([document])[0].ids.tolist()
    targets = [document.text[span.start : span.end] for span in document.spans]
    return tokenizer.decode(ids), [chat._control.shown(text) for text in targets], document


@pytest.fixture(scope="module")
def phi4():
    return phi4_mini_tokenizer()


@pytest.fixture(scope="module")
def other():
    return phi4_tokenizer(OTHERS, markers=PHI_3_TOKENS)


def test_phi_4_mini_gets_tools_in_the_system_turn_and_calls_in_the_content(phi4):
    row = {
        "messages": [ASK, call('{"a": "<|end|>"}'), {"role": "tool", "content": "1", "name": "f"}, ANSWER],
        "tools": TOOLS,
    }
    text, targets, document = render(phi4, row)
    written = '<|tool_call|>[{"name": "f", "arguments": {"a": "<|end|>"}}]<|/tool_call|><|end|>'
    assert text == (
        f"<|system|><|tool|>{json.dumps(TOOLS)}<|/tool|><|end|><|user|>u<|end|><|assistant|>{written}<|tool|>1<|end|>"
        "<|assistant|>a<|end|><|endoftext|>"
    )
    assert targets == [written, "a<|end|>"]
    assert document.is_literal  # the <|end|> in the call is text
    assert any("system turn" in remark for remark in document.remarks)
    assert any("written as <|tool_call|>" in remark for remark in document.remarks)
    assert document.passed_over == ("name",)  # which repeats the call's
    own = {"role": "system", "content": "s", "tools": json.dumps(TOOLS)}
    assert render(phi4, {"messages": [own, ASK, ANSWER]})[0].startswith(
        f"<|system|>s<|tool|>{json.dumps(TOOLS)}<|/tool|><|end|>"
    )
    assert render(phi4, {"messages": [{**own, "tools": TOOLS}, ASK, ANSWER]})[0].startswith("<|system|>s<|tool|>[{")


@pytest.mark.parametrize("arguments", ['{"a": 1}', {"a": 1}])
def test_arguments_are_objects_where_the_template_writes_json(other, arguments):
    text, targets, _ = render(other, {"messages": [ASK, call(arguments)], "tools": json.dumps(TOOLS)})
    assert text == f'<|system|>{json.dumps(TOOLS)}<|end|><|user|>u<|end|><|assistant|>f{{"a": 1}}<|end|>'
    assert targets == ['f{"a": 1}<|end|>']


def test_arguments_of_both_forms_in_one_row_and_empty_ones(other):
    messages = [ASK, call('{"a": 1}'), ASK, call({"a": 2}), ASK, call("{}")]
    text, _, document = render(other, {"messages": messages, "tools": TOOLS})
    assert text.endswith(
        'f{"a": 1}<|end|><|user|>u<|end|><|assistant|>f{"a": 2}<|end|><|user|>u<|end|><|assistant|>f{}<|end|>'
    )
    assert any("arguments" in remark for remark in document.remarks)
    quotes = phi4_tokenizer(
        OTHERS.replace("(c.function.arguments | tojson)", "'\"' + c.function.arguments + '\"'"), markers=PHI_3_TOKENS
    )
    assert render(quotes, {"messages": [ASK, call("{}")]})[0].endswith('f"{}"<|end|>')  # the template's own quotes


def test_arguments_are_text_where_the_template_adds_them_to_text():
    adds = phi4_tokenizer(
        OTHERS.replace("(c.function.arguments | tojson)", "c.function.arguments"), markers=PHI_3_TOKENS
    )
    assert '<|assistant|>f{"a": 1}<|end|>' in render(adds, {"messages": [ASK, call({"a": 1})]})[0]


def test_reasoning_names_documents_and_settings_are_shown(other):
    row = {
        "messages": [{**ASK, "name": "n"}, {**ANSWER, "reasoning": "because"}],
        "documents": [{"text": "d<|user|>"}],
        "chat_template_kwargs": {"loud": True},
    }
    text, targets, document = render(other, row)
    assert text == "d<|user|>!<|user|>n:u<|end|><|assistant|>{because}a<|end|>"
    assert targets == ["{because}a<|end|>"]
    assert document.is_literal  # the <|user|> of the document
    earlier = [ASK, {**ANSWER, "reasoning_content": "r"}, ASK, {**ANSWER, "reasoning_content": "r"}]
    assert any("earlier turns" in remark for remark in render(other, {"messages": earlier})[2].remarks)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": [ASK, ANSWER], "tools": TOOLS}, r"has tools, .*data.ignore_keys: \[tools, functions\]"),
        ({"messages": [ASK, call({})]}, r"has tool_calls \(turn 2\), .*\[tool_calls\]"),
        ({"messages": [ASK, {**ANSWER, "thinking": "t"}]}, r"has thinking \(turn 2\), .*\[thinking\]"),
        ({"messages": [{**ASK, "name": "n"}, ANSWER]}, r"has name \(turn 1\)"),
        ({"messages": [ASK, ANSWER], "documents": [{"text": "d"}]}, "has documents,"),
        (
            {"messages": [ASK, ANSWER], "chat_template_kwargs": {"loud": 1}},
            r"has chat_template_kwargs.loud, .*_kwargs\]",
        ),
        (
            {"messages": [ASK, ANSWER], "chat_template_kwargs": {"bos_token": "x"}},
            "chat_template_kwargs sets bos_token, which no row can",
        ),
        (
            {"messages": [ASK, ANSWER], "chat_template_kwargs": {"chat_template": "x"}},
            "chat_template_kwargs sets chat_template",
        ),
    ],
)
def test_what_the_template_does_not_show_is_an_error_that_names_it(row, message):
    with pytest.raises(InputError, match=f"row 1: {message}"):
        render(phi3_tokenizer(JULY), row)


def test_keys_that_nothing_reads_are_told(other):
    messages = [ASK, {**call({}), "id": 7}, {"role": "tool", "content": "1", "tool_call_id": "1"}, ANSWER]
    assert set(render(other, {"messages": messages})[2].passed_over) == {"id", "tool_call_id"}
    shows = phi4_tokenizer(OTHERS.replace("{{ m.content }}", "{{ m.content }}{{ m.id }}"), markers=PHI_3_TOKENS)
    text, _, document = render(shows, {"messages": [ASK, {**ANSWER, "id": 7, "source": "s"}]})
    assert text.endswith("a7<|end|>")
    assert document.passed_over == ("source",)


def test_a_setting_may_say_what_the_template_does_anyway(other):
    row = {"messages": [ASK, ANSWER], "chat_template_kwargs": {"loud": False}}
    assert render(other, row)[0] == "<|user|>u<|end|><|assistant|>a<|end|>"


def test_no_row_depends_on_the_rows_before_it(other, phi4):
    rows = [
        {"messages": [ASK, call(arguments)], "tools": tools}
        for arguments in ("{}", {}, '{"a": 1}', {"a": 1})
        for tools in (TOOLS, json.dumps(TOOLS))
    ]
    # A template that writes a single call's arguments as JSON, and takes those of several as they come.
    given = "c.function.arguments"
    either = f"({given} if m.tool_calls | length > 1 and {given} is string else {given} | tojson)"
    odd = phi4_tokenizer(OTHERS.replace(f"({given} | tojson)", either), markers=PHI_3_TOKENS)
    two = {**call('{"a":1}'), "tool_calls": 2 * call('{"a":1}')["tool_calls"]}
    rows.append({"messages": [ASK, two], "tools": TOOLS})
    for tokenizer in (other, phi4, odd):
        alone = [render(tokenizer, row)[0] for row in rows]
        for order in (rows, rows[::-1]):
            chat = ChatTokenizer(tokenizer)
            documents = [chat.render(read_row(row, "row"), "row") for row in order]
            found = [tokenizer.decode(encoded.ids) for encoded in chat.encode(documents)]
            assert found == (alone if order is rows else alone[::-1])
