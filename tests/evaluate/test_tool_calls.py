"""Tool calls in a model's own way to write them, and which of them are right."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

from phi3_jax.evaluate.metric import Row
from phi3_jax.evaluate.metrics import make_metrics
from phi3_jax.evaluate.tool_calls import read_calls
from phi3_jax.generation.tokens import decode
from phi3_jax.report.statistics import bootstrap_interval, estimate
from phi3_jax.system.errors import InputError
from tests.helpers.tokenizers import PHI_3_TOKENS, PHI_4_MINI, phi4_tokenizer

CALL = '{"name": "find", "arguments": {"q": "tea", "n": 2}}'
ESCAPED = json.dumps(json.dumps({"n": 2, "q": "tea"}))

FORMS = {
    "Phi-4-mini": f"<|tool_call|>[{CALL}]<|/tool_call|>",
    "without its tokens": f"[{CALL}]",
    "vLLM's for Phi-4-mini": f"functools[{CALL}]",
    "Hermes and Qwen": f"<tool_call>\n{CALL}\n</tool_call>",
    "Llama": '{"name": "find", "parameters": {"q": "tea", "n": 2}}',
    "Llama's with its type": '{"type": "function", "name": "find", "parameters": {"q": "tea", "n": 2}}',
    "OpenAI": f'{{"id": "1", "type": "function", "function": {{"name": "find", "arguments": {ESCAPED}}}}}',
    "arguments as text": f'[{{"name": "find", "arguments": {ESCAPED}}}]',
    "words around it": f"I look {{it}} up [1]:\n```json\n{CALL}\n```\nOne moment.",
    "blanks and order": ' [ {"arguments" :{ "n":2.0,\n"q":"tea"},"name":"find"} ] ',
    "after a broken one": '{"name": "find", "arguments" {} or rather ' + CALL,
    "after a thought": f'<think>{CALL} or {{"name": "list", "arguments": {{}}}}?</think>{CALL}',
}


@pytest.mark.parametrize("form", FORMS)
def test_a_call_is_read_in_every_form(form):
    (call,) = read_calls(FORMS[form])
    (expected,) = read_calls(CALL)
    assert (call.name, call.key) == ("find", expected.key)
    assert call.arguments == {"q": "tea", "n": 2}


def test_the_forms_of_the_page_make_one_call():
    page = (Path(__file__).parents[2] / "docs" / "evaluation.md").read_text(encoding="utf-8")
    (forms,) = re.findall(r"```\n(<\|tool_call\|>.*?)```", page, re.DOTALL)
    calls = read_calls(forms)
    assert len(calls) == 5
    assert {call.key for call in calls} == {read_calls('{"name": "find", "arguments": {"q": "tea"}}')[0].key}


@pytest.mark.parametrize(
    "text",
    [
        f"<|tool_call|>[{CALL}, {CALL}]<|/tool_call|>",
        f"<|tool_call|>[{CALL}]<|/tool_call|><|tool_call|>[{CALL}]<|/tool_call|>",
        f"[{CALL}][{CALL}]",
        f"<tool_call>{CALL}</tool_call>\n<tool_call>{CALL}</tool_call>",
        f"{CALL}; {CALL}",
    ],
)
def test_several_calls(text):
    assert [call.name for call in read_calls(text)] == ["find", "find"]


@pytest.mark.parametrize(
    "given", ['"arguments": {}', '"parameters": ""', '"arguments": "{}"', '"arguments": null', None]
)
def test_a_call_without_arguments(given):
    (call,) = read_calls('{"name": "now"}' if given is None else f'{{"name": "now", {given}}}')
    assert call.key == read_calls('{"name": "now", "arguments": {}}')[0].key


@pytest.mark.parametrize(
    "text",
    [
        "",
        "The tea is ready.",
        '{"name": "Ann", "age": 3}',
        '{"name": 3, "arguments": {}}',
        '{"function": {"arguments": {}}}',
        '{"name": "find", "arguments": "tea"}',
        CALL[:-1],
        f"[{CALL}",
        f"[{CALL}, 3]",
        f'[{CALL}, {{"name": "find", "argum',
        f"<think>{CALL}",
        CALL.replace('"', "'"),
        '{"name": "find", "arguments": {"q": {"name": "list", "arguments": {}}}',
    ],
)
def test_what_calls_nothing(text):
    assert read_calls(text) == []


@pytest.mark.parametrize(
    ("one", "other", "is_equal"),
    [
        ("1", "1.0", True),
        ("1", "1e0", True),
        ("0.1", "0.10", True),
        ("1", "true", False),
        ("0", "false", False),
        ("1", '"1"', False),
        ("null", "{}", False),
        ("null", "0", False),
        ('"tea"', '"tea "', False),
        ('"\\u00e9"', '"é"', True),
        ("[1, 2]", "[2, 1]", False),
        ('{"a": 1, "b": [true]}', '{"b":[true],"a":1.0}', True),
        ('{"a": 1}', '{"a": 1, "b": null}', False),
        (str(2**53 + 1), f"{2**53}.0", False),
        ("9" * 5000, "9" * 4999 + "8", False),
    ],
)
def test_arguments_are_equal_as_json(one, other, is_equal):
    one, other = (read_calls(f'{{"name": "f", "arguments": {{"x": {text}}}}}')[0].key for text in (one, other))
    assert (one == other) is is_equal


@pytest.mark.parametrize(
    "text",
    [
        '{"a":' * 2**20,
        '[{"name": "f", "arguments": ' + "[" * 2**20,
        '{"name": "f", "arguments": "' + "[" * 2**20 + '"}',
        '{"name": "f", "arguments": ' + "[" * 700 + "]" * 700 + "}",
        '{"a" ' * 2**20,
        "[ " * 2**20,
    ],
    ids=["objects", "lists", "text", "just parsed", "broken", "brackets"],
)
def test_a_hostile_text_calls_nothing(text):
    assert read_calls(text) == []


@pytest.mark.parametrize("is_special", [True, False])
def test_a_call_is_read_from_what_was_decoded(is_special):
    tokenizer = phi4_tokenizer(PHI_4_MINI, markers=PHI_3_TOKENS)
    markers = ["<|tool_call|>", "<|/tool_call|>"]
    tokenizer.add_tokens(markers, special_tokens=is_special)
    ids = tokenizer(FORMS["Phi-4-mini"])["input_ids"]
    assert [tokenizer.convert_ids_to_tokens(ids[place]) for place in (0, -1)] == markers
    texts = [decode(tokenizer, ids, skip) for skip in (True, False)]
    assert (texts[0] == texts[1]) is not is_special
    assert [call.name for text in texts for call in read_calls(text)] == ["find", "find"]


OTHER = '{"name": "find", "arguments": {"q": "milk"}}'
LIST = '{"name": "list", "arguments": {}}'
# Reference, answer; of the reference's calls how many are right, and named; whether the row is right.
ROWS = [
    (CALL, f"Yes: {CALL}", 1, 1, 1),
    (CALL, OTHER, 0, 1, 0),
    (CALL, "The tea is ready.", 0, 0, 0),
    (CALL, f"[{CALL}, {LIST}]", 1, 1, 0),
    (CALL, f"[{CALL}, {CALL}]", 1, 1, 0),
    (f"[{CALL}, {OTHER}]", f"{OTHER}{CALL}", 2, 2, 1),
    (f"[{CALL}, {CALL}]", CALL, 1, 1, 0),
    (f"[{CALL}, {LIST}]", f"[{OTHER}, {LIST}]", 1, 2, 0),
    ("The tea is ready.", "It is hot.", 0, 0, 1),
    ("The tea is ready.", CALL, 0, 0, 0),
]


def scored(rows):
    (metric,) = make_metrics(["tool_call"]).values()
    metric.prepare([reference for reference, *_ in rows])
    return metric, [Row(answer, reference, metric.score(answer, reference)) for reference, answer, *_ in rows]


def test_calls_and_rows_are_counted():
    metric, rows = scored(ROWS)
    found = [[row.scores[name] for name in ("tool_calls_right", "tool_calls_named", "tool_call_row")] for row in rows]
    assert found == [list(row[2:]) for row in ROWS]
    columns = metric.columns(rows)
    figures = {figure.name: estimate(columns[figure.name], statistic=figure.statistic) for figure in metric.figures}
    # Of 11 calls in 8 rows.
    assert figures == {"tool_call": 7 / 11, "tool_call_name": 9 / 11, "tool_call_row": 3 / 10}


def test_rows_that_end_without_a_call_are_told():
    assert scored([(CALL, CALL), (LIST, CALL)])[0].notice is None
    assert scored(ROWS)[0].notice == (
        "tool_call: 8 of 10 references make a tool call; in the other rows an answer is right when it makes none"
    )


def test_the_interval_is_over_rows_that_should_call():
    metric, rows = scored([(CALL, CALL), (CALL, OTHER), *[("No.", "No.")] * 50])
    columns = metric.columns(rows)
    # Of all rows most draws would hold no call, and have no figure.
    low, high = bootstrap_interval(columns["tool_call"])
    assert (low, high) == (0, 1)
    assert np.isfinite(bootstrap_interval(columns["tool_call_row"])).all()


def test_references_without_a_call_are_refused():
    with pytest.raises(InputError, match=r"metric tool_call: none of the 2 references makes a tool call") as error:
        scored([("The tea is ready.", CALL), (CALL[:-1], CALL)])
    assert "\n" not in str(error.value)
