"""Anchors: they find each text wherever a template puts it, or say that they cannot."""

import json

from phi3_jax.data.anchors import TOOLS, Anchored

NONCE = "31415926535"


def anchors(write, messages, variables=None):
    variables = variables or {}
    anchored = Anchored(messages, variables, NONCE)
    return anchored.found_in(write(anchored.messages, anchored.variables), write(messages, variables))


def test_texts_are_found_where_they_are_trimmed_escaped_and_moved():
    messages = [
        {"role": "user", "content": " 1\n"},
        {"role": "tool", "content": '"a"'},
        {"role": "user", "content": ""},
    ]

    def write(turns, _):
        return json.dumps(turns[1]["content"]) + "|" + turns[0]["content"].strip().upper() + turns[2]["content"]

    seen = anchors(write, messages)
    assert seen.spans == {1: (1, 6), 0: (8, 9)}
    assert seen.shows(0, "content")
    assert not seen.shows(2, "content")  # which is blank


def test_what_is_left_out_is_told_call_by_call_and_tool_by_tool():
    calls = [
        {"function": {"name": "f", "arguments": {"n": 1, "of": [{"text": "x"}]}}},
        {"name": "g", "arguments": "{}"},
    ]
    turn = {"role": "assistant", "content": "", "tool_calls": calls, "reasoning": "r"}
    tools = [{"type": "function", "function": {"name": "f"}}, {"name": "g"}]

    def write(turns, beside):
        return json.dumps(turns[0]["tool_calls"][0]) + beside["tools"][0]["function"]["name"]

    seen = anchors(write, [turn], {"tools": tools})
    assert (0, "tool_calls", 0) in seen.shown
    assert (0, "tool_calls", 1) in seen.sought - seen.shown
    assert not seen.shows(0, "tool_calls")
    assert not seen.shows(0, "reasoning")
    assert (TOOLS, "tools", 0) in seen.shown
    assert not seen.shows(TOOLS, "tools")
    assert set(seen.spans) == {0}  # tools are nobody's words


def test_a_template_that_writes_otherwise_for_anchors_has_none():
    messages = [{"role": "user", "content": "abc"}]
    assert anchors(lambda turns, _: turns[0]["content"][:2], messages) is None
    assert anchors(lambda turns, _: str(len(turns[0]["content"])), messages) is None
