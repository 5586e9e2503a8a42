"""Calls of tools, read from a text in whichever way its model writes them, and how many of them are right."""

import json
import re
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from decimal import Decimal

import numpy as np

from phi3_jax.evaluate.metric import Columns, Figure, Metric, Row, Scores
from phi3_jax.system.errors import InputError

_BEGINS = re.compile(r'(?:\[\s*)?\{\s*"')  # an object, or a list of objects
_MOST_BROKEN = 1000  # beginnings that a text may have of JSON that is none, before it is given up
_BESIDE_NAME = {"name", "id", "type", "index"}  # all that a call without arguments has

# Python makes a whole number of at most 4300 digits.
_JSON = json.JSONDecoder(parse_int=lambda digits: int(digits) if len(digits) < 4300 else Decimal(digits))


@dataclass(frozen=True)
class Call:
    """A call of a tool.

    Attributes:
        name: The tool's.
        arguments: A JSON value, an object as a rule.
    """

    name: str
    arguments: object

    @property
    def key(self) -> Hashable:
        """The same for calls that have one name and arguments that are equal as JSON: 1 is 1.0, and not true."""
        return self.name, _key(self.arguments)


def read_calls(text: str) -> list[Call]:
    """The calls that a text makes.

    They are JSON: objects, or lists of nothing but such objects, with `name` and `arguments` (or `parameters`), or
    with both in a `function`, as OpenAI writes them; arguments may be JSON text. What stands around them is not
    looked at, since decoding may leave it out (`<|tool_call|>`, `<tool_call>`, `functools`), but calls within
    `<think>` and `</think>` are only thought of. What is no JSON, is cut off or has another shape calls nothing.

    Example:
        >>> read_calls('<|tool_call|>[{"name": "add", "arguments": {"a": 1}}]<|/tool_call|>')
        [Call(name='add', arguments={'a': 1})]
        >>> read_calls('I look.\\n<tool_call>\\n{"name": "find", "arguments": {"q": "x"}}\\n</tool_call>')
        [Call(name='find', arguments={'q': 'x'})]
        >>> read_calls('{"type": "function", "function": {"name": "now", "arguments": "{}"}}')
        [Call(name='now', arguments={})]
        >>> read_calls('{"name": "add", "arguments": {"a": 1}')
        []
    """
    text = text.rpartition("</think>")[2].partition("<think>")[0]
    calls: list[Call] = []
    position = broken = 0
    while broken < _MOST_BROKEN and (begin := _BEGINS.search(text, position)):
        try:
            value, position = _JSON.raw_decode(text, begin.start())
            calls += _calls(value)
        except json.JSONDecodeError as error:
            # All up to there is the one broken value, also what would be a call by itself.
            position = max(error.pos, begin.start() + 1)
            broken += 1
        except RecursionError:  # as deep as no call is, and the rest is part of it
            break
    return calls


def _calls(value: object) -> list[Call]:
    """The calls of a JSON value; none where one of them is no call."""
    found = [_call(part) for part in (value if isinstance(value, list) else [value])]
    calls = [call for call in found if call is not None]
    return calls if len(calls) == len(found) else []


def _call(value: object) -> Call | None:
    if isinstance(value, dict) and isinstance(value.get("function"), dict):
        value = value["function"]
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        return None
    if "arguments" not in value and "parameters" not in value and not value.keys() <= _BESIDE_NAME:
        return None
    arguments = value.get("arguments", value.get("parameters"))
    if isinstance(arguments, str) and arguments.strip():
        try:
            arguments = _JSON.decode(arguments)
        except json.JSONDecodeError:
            return None
    call = Call(value["name"], {} if arguments in (None, "") else arguments)
    hash(call.key)  # raises `RecursionError` here and not where calls are compared
    return call


def _key(value: object) -> Hashable:
    """What is equal, and hashed the same, for JSON values that are equal."""
    if isinstance(value, dict):
        return "object", frozenset((name, _key(part)) for name, part in value.items())
    if isinstance(value, list):
        return "list", tuple(_key(part) for part in value)
    if isinstance(value, bool):
        return "boolean", value
    assert isinstance(value, Hashable)
    return value


class ToolCalls(Metric):
    """Tool calls held against the reference's: same name, arguments equal as JSON, in any order.

    The order of a turn's calls says nothing: they are made side by side, before an answer to one is known.

    Per call, over the references' calls: how many the answer makes exactly (`tool_call`), and how many by name
    (`tool_call_name`). Per row: whether the answer makes the reference's calls and no others (`tool_call_row`); where
    the reference makes none, whether the answer does neither.
    """

    figures = (Figure("tool_call"), Figure("tool_call_name"), Figure("tool_call_row"))

    def prepare(self, references: Sequence[str]) -> None:
        """Counts the references that make a call. Raises `InputError` where none does."""
        calling = sum(bool(read_calls(reference)) for reference in references)
        if not calling:
            raise InputError(
                f"metric tool_call: none of the {len(references):,} references makes a tool call (JSON with name and "
                "arguments); give rows with calls (turns last looks at the last turn alone), or leave the metric out"
            )
        if calling < len(references):
            self.notice = (
                f"tool_call: {calling:,} of {len(references):,} references make a tool call; in the other rows an "
                "answer is right when it makes none"
            )

    def score(self, answer: str, reference: str) -> Scores:
        """Whether the row is right, and how many calls there are and should be."""
        made, wanted = read_calls(answer), read_calls(reference)
        right = Counter(call.key for call in made) & Counter(call.key for call in wanted)
        named = Counter(call.name for call in made) & Counter(call.name for call in wanted)
        return {
            "tool_call_row": float(right.total() == len(made) == len(wanted)),
            "tool_calls": len(wanted),
            "tool_calls_made": len(made),
            "tool_calls_right": right.total(),
            "tool_calls_named": named.total(),
        }

    def columns(self, rows: Sequence[Row]) -> dict[str, Columns]:
        """Sums over the references' calls and their number, of rows that have some; and every row's own score."""
        calling = [row.scores for row in rows if row.scores["tool_calls"]]

        def share(name: str) -> Columns:
            return np.array([[scores[name], scores["tool_calls"]] for scores in calling])

        return {
            "tool_call": share("tool_calls_right"),
            "tool_call_name": share("tool_calls_named"),
            "tool_call_row": np.array([[row.scores["tool_call_row"], 1.0] for row in rows]),
        }
