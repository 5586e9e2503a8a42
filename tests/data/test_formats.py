"""From columns to conversations."""

import json

import pytest

from phi3_jax.data.formats import Conversation, Prerendered, Turn, read_row
from phi3_jax.system.errors import InputError

PAIR = (Turn("user", "u"), Turn("assistant", "a"))
MESSAGES = [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]
SHAREGPT = [{"from": "human", "value": "u"}, {"from": "gpt", "value": "a"}]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"messages": MESSAGES}, Conversation(PAIR)),
        ({"messages": json.dumps(MESSAGES)}, Conversation(PAIR)),
        ({"messages": MESSAGES, "prompt": "other", "prompt_id": 3}, Conversation(PAIR)),
        ({"conversations": SHAREGPT}, Conversation(PAIR)),
        ({"conversations": MESSAGES}, Conversation(PAIR)),
        ({"conversations": SHAREGPT, "system": "s"}, Conversation((Turn("system", "s"), *PAIR))),
        ({"instruction": "u", "input": "", "output": "a", "text": "other"}, Conversation(PAIR, True)),
        ({"instruction": "u", "input": None, "output": "a"}, Conversation(PAIR, True)),
        ({"instruction": "u", "input": "i", "output": "a"}, Conversation((Turn("user", "u\n\ni"), PAIR[1]), True)),
        ({"prompt": "u", "completion": "a"}, Conversation(PAIR, True)),
        ({"prompt": "u", "completion": 42}, Conversation((PAIR[0], Turn("assistant", "42")), True)),
        (
            {"prompt": MESSAGES, "completion": MESSAGES[1:]},
            Conversation((Turn("user", "u", False), Turn("assistant", "a", False), PAIR[1]), completion=2),
        ),
        ({"text": "<|user|>"}, Prerendered("<|user|>")),
    ],
)
def test_every_format_is_told_by_its_columns(row, expected):
    assert read_row(row, "row 1") == expected


def test_contents_in_parts_and_weights():
    turns = [
        {
            "role": "user",
            "content": [{"type": "text", "value": "u"}, {"type": "text", "text": "v"}],
            "loss_weight": 0.0,
        },
        {"role": "assistant", "content": [{"type": "text", "value": "a"}], "loss_weight": 0.0},
        {"role": "assistant", "content": "b", "weight": 1},
    ]
    expected = (Turn("user", "uv", False), Turn("assistant", "a", False), Turn("assistant", "b", True))
    assert read_row({"messages": turns}, "row 1") == Conversation(expected)


def test_columns_are_mapped_and_decide_the_format():
    row = {"question": "u", "answer": "a", "text": "other"}
    assert read_row(row, "row 1", columns={"prompt": "question", "completion": "answer"}) == Conversation(PAIR, True)
    row = {"question": "u", "completion": "a", "messages": MESSAGES}
    assert read_row(row, "row 1", columns={"prompt": "question"}) == Conversation(PAIR, True)
    assert read_row({"story": "t"}, "row 1", format="text", columns={"text": "story"}) == Prerendered("t")


@pytest.mark.parametrize(
    ("row", "options", "message"),
    [
        (
            {"question": "u", "answer": "a"},
            {},
            r"row 1: the columns question, answer fit no format \(messages: messages;",
        ),
        ({"instruction": "u", "response": "a"}, {}, "{output: response}"),
        ({"conversation": []}, {}, "{messages: conversation}"),
        ({"q": "u"}, {"columns": {"promt": "q"}}, "data.columns: 'promt' is no part of a row"),
        ({"q": "u"}, {"columns": {"prompt": "x"}}, "data.columns wants 'x' as prompt, but the columns are q"),
        ({"q": "u"}, {"format": "text"}, "row 1: has the columns q; format text needs text"),
        ({"messages": [{"role": "judge", "content": "u"}]}, {}, "row 1, turn 1: unknown role 'judge'; expected one of"),
        ({"messages": [{"content": "u"}]}, {}, "row 1, turn 1: unknown role None"),
        ({"messages": "no json"}, {}, "row 1: the turns are text that is not JSON"),
        ({"messages": {"role": "user"}}, {}, "row 1: the turns are a dict"),
        ({"messages": ["u"]}, {}, "row 1, turn 1: is a str"),
        ({"messages": None}, {}, "row 1: the turns are a NoneType"),
        ({"messages": [{"role": "assistant", "content": "a", "weight": 0.5}]}, {}, "turn 1: the loss weight is 0.5"),
        (
            {"messages": [{"role": "assistant", "tool_calls": [{"id": 1}]}]},
            {},
            "turn 1: a call in tool_calls has no name",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "image"}]}]},
            {},
            "turn 1: content holds a part of type 'image'",
        ),
        (
            {"prompt": "a", "completion": float("nan")},
            {},
            "row 1: completion is the number nan, expected text; tables have it",
        ),
        ({"text": {"a": 1}}, {}, "row 1: text is a dict, expected text"),
        ({"text": "\ud800"}, {}, "row 1: text holds half of a surrogate pair"),
    ],
)
def test_what_fits_no_format(row, options, message):
    with pytest.raises(InputError, match=message) as caught:
        read_row(row, "row 1", **options)
    assert "\n" not in str(caught.value)
