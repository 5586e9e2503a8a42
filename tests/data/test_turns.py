"""Turns of every spelling: who speaks, what is called, what is learnt from; and what is refused, by key."""

import pytest

from phi3_jax.data.turns import Turn, read_turns
from phi3_jax.system.errors import InputError

CALL = {"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}


@pytest.mark.parametrize(
    ("turn", "expected"),
    [
        ({"from": "human", "value": "u"}, Turn("user", "u")),
        ({"role": "developer", "content": "s"}, Turn("system", "s")),
        ({"from": "observation", "value": "42"}, Turn("tool", "42")),
        ({"from": "gpt", "value": "a", "loss": None, "train": True}, Turn("assistant", "a")),
        ({"role": "assistant", "content": "a", "loss": False}, Turn("assistant", "a", False)),
        ({"role": "assistant", "content": "a", "train": False}, Turn("assistant", "a", False)),
        ({"role": "assistant", "content": "a", "training": 0}, Turn("assistant", "a", False)),
        ({"role": "user", "content": "u", "weight": 1.0}, Turn("user", "u")),
        (
            {"role": "assistant", "content": None, "tool_calls": [CALL], "images": []},
            Turn("assistant", "", True, {"tool_calls": [CALL]}, is_given=False),
        ),
        (
            {"role": "assistant", "content": "", "function_call": {"name": "f", "arguments": '{"a": 1}'}},
            Turn(
                "assistant",
                "",
                True,
                {"tool_calls": [{"type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}]},
            ),
        ),
        (
            {"from": "function_call", "value": '{"name": "f", "arguments": {"a": 1}}'},
            Turn("assistant", "", True, {"tool_calls": [CALL]}, is_given=False),
        ),
        ({"role": "system", "content": "s", "functions": "[]"}, Turn("system", "s")),
        ({"role": "system", "content": "s", "tools": '[{}]'}, Turn("system", "s", extra={"tools": "[{}]"})),
        ({"role": "tool", "content": "1", "tool_call_id": "x"}, Turn("tool", "1", extra={"tool_call_id": "x"})),
    ],
)  # fmt: skip
def test_what_a_turn_says(turn, expected):
    assert read_turns([turn], "row 1") == (expected,)


@pytest.mark.parametrize(
    ("turn", "message"),
    [
        ({"role": "user", "content": 5}, "content is the number 5, expected text"),
        ({"role": "user", "contents": "u"}, "has no content or value, only role, contents"),
        ({"role": "user", "content": None}, "has no content or value"),
        ({"rol": "user", "content": "u"}, "unknown role None \\(its keys: rol, content\\)"),
        ({"role": "user", "content": "u", "train": True}, "train is True for a turn of the user"),
        ({"role": "assistant", "content": "a", "loss": "no"}, r"the loss weight is 'no' \(loss\)"),
        ({"role": "assistant", "content": "a", "loss": True, "weight": 0}, "loss says to learn from it and weight not"),
        ({"role": "user", "content": "u", "images": ["a.png"]}, "has images"),
        ({"role": "user", "content": "u", "tool_calls": [CALL]}, "has tool_calls, but only the assistant"),
        ({"role": "assistant", "tool_calls": "[{"}, "tool_calls is text that is not JSON"),
        ({"role": "assistant", "tool_calls": [{"function": {}}]}, "a call in tool_calls has no name"),
        ({"role": "assistant", "tool_calls": [CALL], "function_call": CALL}, "has tool_calls and function_call"),
        ({"role": "assistant", "tool_calls": [{"name": "f", "arguments": "{"}]}, "the arguments of f are text that is"),
        ({"from": "function_call", "value": "f(1)"}, "function_call is text that is not JSON"),
        ({"role": "system", "content": "s", "tools": "f"}, "tools is text that is not JSON"),
        ({"role": "system", "content": "s", "tools": [1]}, "tools holds a int"),
        ({"role": "system", "content": "s", "tools": [{}], "functions": [{}]}, "has tools and functions"),
    ],
)
def test_what_is_refused_names_turn_and_key(turn, message):
    with pytest.raises(InputError, match=f"row 1, turn 1: {message}") as caught:
        read_turns([turn], "row 1")
    assert "\n" not in str(caught.value)


def test_ignored_keys_are_not_there():
    turn = {"role": "user", "content": "u", "train": True, "images": ["a.png"]}
    assert read_turns([turn], "row 1", ["train", "images"]) == (Turn("user", "u"),)
