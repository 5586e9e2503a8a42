"""The ways in which tools and calls can be handed to a chat template.

Templates look for tools in the argument `tools` or in the system turn, for calls in `tool_calls` or nowhere, for a
call's arguments as an object or as its JSON text.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from phi3_jax.data.anchors import Message
from phi3_jax.data.control_tokens import ControlTokens
from phi3_jax.data.turns import list_of_objects
from phi3_jax.system.errors import InputError

# Phi-4-mini's tokens around calls, which its own template leaves to whoever writes the content.
CALL_TOKENS = ("<|tool_call|>", "<|/tool_call|>")


@dataclass(frozen=True)
class Attempt:
    """One way of handing tools and calls over.

    Attributes:
        messages: The turns.
        variables: What the template sees beside them.
        added: How many messages stand in front of the turns.
        has_tools: Whether there are tools.
        remarks: What is handed over in another way than it was given.
    """

    messages: Sequence[Message]
    variables: Mapping[str, object]
    added: int
    has_tools: bool
    remarks: tuple[str, ...]


Calls = Callable[[list[Message]], tuple[list[Message], tuple[str, ...]]]
Tools = Callable[[tuple[list[Message], tuple[str, ...]]], Attempt]


def ways_of_tools(
    messages: list[Message], column: object, where: str, *, as_variable: bool = True
) -> tuple[list[Message], list[Tools]]:
    """The ways of handing tools over.

    Args:
        messages: May hold tools.
        column: The row's own tools, None where it has none.
        where: What error messages call the row.
        as_variable: Whether the template may read the variable `tools`.

    Returns:
        The messages without tools, and the ways, the one they were given in first.

    Raises:
        InputError: For tools in a column and in a turn.

    Example:
        >>> bare, ways = ways_of_tools([{"role": "user", "content": "u"}], [{"name": "f"}], "row 1")
        >>> [way((bare, ())).variables for way in ways]
        [{'tools': [{'name': 'f'}]}, {}]
    """
    holder = next((number for number, message in enumerate(messages) if "tools" in message), None)
    if holder is not None and column is not None:
        raise InputError(f"{where}: has tools in a column and in turn {holder + 1}; leave one out")
    if holder is None and column is None:
        return messages, [lambda found: Attempt(found[0], {}, 0, False, found[1])]
    given = column if holder is None else messages[holder]["tools"]
    as_text = given if isinstance(given, str) else json.dumps(given, ensure_ascii=False)
    system = next((number for number, message in enumerate(messages) if message["role"] == "system"), None)

    def as_argument(found: tuple[list[Message], tuple[str, ...]]) -> Attempt:
        remarks = () if holder is None else ("tools of a turn are handed to the chat template as its argument tools",)
        tools = list_of_objects(given, where, "tools")
        return Attempt(found[0], {"tools": tools}, 0, True, (*found[1], *remarks))

    def in_turn(value: object) -> Tools:
        def hand(found: tuple[list[Message], tuple[str, ...]]) -> Attempt:
            remarks = () if holder is not None else ("tools are handed over in the system turn",)
            added = int(system is None)
            turns: list[Message] = [{"role": "system", "content": ""}, *found[0]] if added else list(found[0])
            index = holder if holder is not None else system or 0
            turns[index] = {**turns[index], "tools": value}
            return Attempt(turns, {}, added, True, (*found[1], *remarks))

        return hand

    ways = [in_turn(as_text)] if holder is None else [in_turn(given), in_turn(as_text)]
    if as_variable:
        ways.insert(0 if holder is None else 2, as_argument)
    return [less(message, "tools") for message in messages], ways


def ways_of_calls(messages: Sequence[Message], control: ControlTokens, *, as_key: bool = True) -> list[Calls]:
    """The ways of handing calls over: as given, all arguments objects or all text, written into the content.

    Args:
        messages: May hold calls.
        control: The tokenizer's control tokens.
        as_key: Whether the template may read the key `tool_calls`.
    """
    if not any("tool_calls" in message for message in messages):
        return [lambda turns: (turns, ())]
    can_be_written = all(token in control and token not in control.of_turns for token in CALL_TOKENS)
    if can_be_written and not as_key:
        return [_written]
    ways: list[Calls] = [
        lambda turns: (turns, ()),
        lambda turns: _told(turns, with_arguments(turns, _object)),
        lambda turns: _told(turns, with_arguments(turns, _text)),
    ]
    return [*ways, _written] if can_be_written else ways


def _told(given: list[Message], turns: list[Message]) -> tuple[list[Message], tuple[str, ...]]:
    """The turns, with calls in OpenAI's form, and what changed."""
    remarks: tuple[str, ...] = ()
    if given != turns:
        remarks = ("arguments of calls change between JSON text and object",)
    for turn in turns:
        calls = turn.get("tool_calls", [])
        assert isinstance(calls, list)
        if any("function" not in call for call in calls):
            turn["tool_calls"] = [
                call if "function" in call else {"type": "function", "function": call} for call in calls
            ]
            remarks += ("calls are handed over as {type: function, function: {name: ..., arguments: ...}}",)
    return turns, tuple(dict.fromkeys(remarks))


def functions(message: Message) -> Iterator[dict[str, object]]:
    """The calls of a message: what holds `name` and `arguments` of each.

    Example:
        >>> list(functions({"tool_calls": [{"function": {"name": "f"}}, {"name": "g"}]}))
        [{'name': 'f'}, {'name': 'g'}]
    """
    calls = message.get("tool_calls", [])
    assert isinstance(calls, list)
    for call in calls:
        function = call.get("function")
        yield function if isinstance(function, dict) else call


def with_arguments(turns: Sequence[Message], form: Callable[[object], object]) -> list[Message]:
    """The turns with the arguments of every call that has some in another form.

    Example:
        >>> with_arguments([{"tool_calls": [{"name": "f", "arguments": "{}"}]}], json.loads)
        [{'tool_calls': [{'name': 'f', 'arguments': {}}]}]
    """
    copy: list[Message] = json.loads(json.dumps(list(turns)))
    for turn in copy:
        for function in functions(turn):
            if function.get("arguments") is not None:
                function["arguments"] = form(function["arguments"])
    return copy


def _written(turns: list[Message]) -> tuple[list[Message], tuple[str, ...]]:
    """The turns with calls behind their content, as Phi-4-mini writes them."""
    found = []
    for turn in turns:
        if "tool_calls" in turn:
            calls = [
                {"name": function["name"], "arguments": _object(function.get("arguments"))}
                for function in functions(turn)
            ]
            text = json.dumps(calls, ensure_ascii=False).join(CALL_TOKENS)
            turn = {**less(turn, "tool_calls"), "content": f"{turn.get('content', '')}{text}"}
        found.append(turn)
    return found, (f"tool_calls are written as {'[...]'.join(CALL_TOKENS)}, which the template leaves to the row",)


def _object(arguments: object) -> object:
    if isinstance(arguments, str):
        return json.loads(arguments) if arguments.strip() else {}
    return {} if arguments is None else arguments


def _text(arguments: object) -> str:
    return arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)


def less(message: Message, key: str) -> Message:
    """A message without a key.

    Example:
        >>> less({"role": "user", "name": "n"}, "name")
        {'role': 'user'}
    """
    return {name: value for name, value in message.items() if name != key}
