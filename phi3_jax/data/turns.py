"""A row's turns: who speaks, what is said and called, and whether it is to be learnt from."""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from phi3_jax.system.errors import InputError
from phi3_jax.system.numbers import is_number
from phi3_jax.system.text import shown

ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "ai": "assistant",
    "tool": "tool",
    "function": "tool",
    "function_response": "tool",
    "observation": "tool",
    "function_call": "assistant",
    "tool_call": "assistant",
}
# Roles whose whole content is one call, or a list of them, as ShareGPT sets have it.
_CALLERS = ("function_call", "tool_call")
_PLAIN = ("user", "assistant", "system")  # who speaks in nearly all turns, and as nearly all files spell it
MEDIA = ("images", "image", "audio", "audios", "videos", "video")
# What a turn may hold beside its text and what every trainer reads alike; all of it is for the template.
TOOL_KEYS = ("tools", "functions")
REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")
CALL_KEYS = ("tool_calls", "function_call")
# Keys that a template must show where a turn has them; what stands under any other key is named where it does not.
MUST_SHOW = (*TOOL_KEYS, *REASONING_KEYS, "tool_calls", "name", "documents", "chat_template_kwargs")
_FLAGS = ("loss", "train", "training")
_WEIGHTS = ("loss_weight", "weight")
_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class Turn:
    """One message.

    Attributes:
        role: `system`, `user`, `assistant` or `tool`.
        content: Its text, "" where it has none.
        trained: False for an assistant's turn that the data says not to learn from.
        extra: What else the template may show, by key, such as `tool_calls`; nothing that is null.
        is_given: False where the row has no content, which templates may tell from an empty one.
    """

    role: str
    content: str
    trained: bool = True
    extra: Mapping[str, object] = field(default_factory=dict)
    is_given: bool = field(default=True, repr=False)


def read_turns(value: object, where: str, ignored: Sequence[str] = ()) -> tuple[Turn, ...]:
    """The turns of a list of messages, of its JSON text, or of one message.

    Args:
        value: The list; each message with `role` and `content`, or `from` and `value`.
        where: What error messages call it.
        ignored: Keys of messages that are passed over.

    Raises:
        InputError: For what is no such list, and for messages with unknown roles or values of the wrong type.

    Example:
        >>> [turn] = read_turns('[{"from": "gpt", "value": "4", "train": false}]', "row 1")
        >>> turn.role, turn.content, turn.trained
        ('assistant', '4', False)
    """
    if isinstance(value, str):  # a CSV cell, or a Parquet column of JSON text
        value = parse_json(value, where, "the turns are text", "a list")
    if not isinstance(value, list):
        raise InputError(f"{where}: the turns are a {type(value).__name__}, expected a list of messages")
    return tuple(_turn(turn, f"{where}, turn {number}", ignored) for number, turn in enumerate(value, 1))


def parse_json(text: str, where: str, what: str, expected: str) -> object:
    """What JSON text says. Raises `InputError`, which says `what` it is and what was `expected`, for other text."""
    try:
        found: object = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: {what} that is not JSON ({error}); expected {expected}") from error
    return found


def _turn(turn: object, where: str, ignored: Sequence[str]) -> Turn:
    if type(turn) is dict and len(turn) == 2 and not ignored:
        # As nearly all are: nothing of what follows would find anything.
        role, content = turn.get("role"), turn.get("content")
        if role in _PLAIN and isinstance(content, str):
            return Turn(role, text_of(content, where, "content"), True, {}, True)
    if not isinstance(turn, Mapping):
        raise InputError(f"{where}: is a {type(turn).__name__}, expected an object with role and content")
    held = {str(key): value for key, value in turn.items() if value is not None and key not in ignored}
    for name in MEDIA:
        if held.pop(name, None):
            raise InputError(f"{where}: has {name}, which a language model cannot see; take such rows out")
    key = "role" if held.get("role") else "from"
    speaker = held.pop(key, None)
    spelled = str(speaker).lower()
    role = ROLES.get(spelled)
    if speaker is None:
        raise InputError(f"{where}: unknown role None (its keys: {', '.join(map(str, turn))}); give role or from")
    if role is None:
        raise InputError(f"{where}: unknown role {speaker!r}; expected one of {', '.join(ROLES)}")
    content = held.pop("content", None)
    content = held.pop("value", None) if content is None else content
    if content is None and not any(held.get(key) for key in CALL_KEYS) and not _is_blank_answer(turn, role):
        raise InputError(f"{where}: has no content or value, only {', '.join(map(str, turn))}; give its text")
    trained = _trained(held, role, where)
    if is_number(content):
        raise InputError(f"{where}: content is the number {content}, expected text; write it in quotes")
    if spelled in _CALLERS:
        return Turn(role, "", trained, {**held, "tool_calls": _calls(content, where, spelled)}, is_given=False)
    _read_calls(held, role, where)
    if role == "system":
        read_tools(held, where)
    return Turn(role, text_of(content, where, "content"), trained, held, content is not None)


def _is_blank_answer(turn: Mapping[object, object], role: str) -> bool:
    """Whether it says itself that the assistant says nothing, which is not trained on."""
    return role == "assistant" and ("content" in turn or "value" in turn)


def _trained(held: dict[str, object], role: str, where: str) -> bool:
    """Whether the turn's flags, which are taken out, let it be learnt from."""
    said: dict[bool, str] = {}
    for name in (*_FLAGS, *_WEIGHTS):
        if name not in held:
            continue
        value = held.pop(name)
        if value not in (0, 1):
            raise InputError(f"{where}: the loss weight is {shown(value)} ({name}); expected 0 (no target) or 1")
        if value and role != "assistant" and name in _FLAGS:
            raise InputError(
                f"{where}: {name} is {shown(value)} for a turn of the {role}; only the assistant's are trained on, or "
                f"everything with data.loss_on: all; pass {name} over with data.ignore_keys"
            )
        said[bool(value)] = name
    if len(said) == 2:
        raise InputError(f"{where}: {said[True]} says to learn from it and {said[False]} not to; leave one out")
    return False not in said


def read_tools(held: dict[str, object], where: str) -> None:
    """Leaves `tools` alone, as it was given, where a row or turn holds tools under either name.

    Raises:
        InputError: For both at once, and for what is no list of definitions.
    """
    given = [name for name in TOOL_KEYS if held.get(name)]
    for name in TOOL_KEYS:
        if name not in given:
            held.pop(name, None)
    if len(given) == 2:
        raise InputError(f"{where}: has tools and functions; leave one out")
    for name in given:
        tools = held.pop(name)
        if list_of_objects(tools, where, name):
            held["tools"] = tools


def list_of_objects(value: object, where: str, name: str) -> list[dict[str, object]]:
    """A list of JSON objects, from the list or its JSON text; one object stands for a list of it.

    Raises:
        InputError: For anything else.
    """
    if isinstance(value, str):
        if not value.strip():
            return []
        value = parse_json(value, where, f"{name} is text", "a list of objects")
    found: list[dict[str, object]] = []
    for item in value if isinstance(value, list) else [value]:
        if not isinstance(item, Mapping):
            raise InputError(f"{where}: {name} holds a {type(item).__name__}, expected a list of objects")
        found.append({str(key): held for key, held in item.items()})
    return found


def _read_calls(held: dict[str, object], role: str, where: str) -> None:
    """Leaves the calls of a turn under `tool_calls`, whichever of the two names they have."""
    given = [name for name in CALL_KEYS if held.get(name)]
    found = {name: held.pop(name, None) for name in CALL_KEYS}
    if not given:
        return
    if len(given) == 2:
        raise InputError(f"{where}: has tool_calls and function_call; leave one out")
    if role != "assistant":
        raise InputError(f"{where}: has {given[0]}, but only the assistant calls tools, not the {role}")
    held["tool_calls"] = _calls(found[given[0]], where, given[0])


def _calls(value: object, where: str, name: str) -> list[dict[str, object]]:
    calls = list_of_objects(value, where, name)
    if not calls:
        raise InputError(f"{where}: {name} holds no call; expected an object with name and arguments")
    return [_call(call, where, name) for call in calls]


def _call(call: dict[str, object], where: str, name: str) -> dict[str, object]:
    """A call in OpenAI's form: its `function` with `name` and `arguments`."""
    inner = call.get("function")
    function = {str(key): value for key, value in inner.items()} if isinstance(inner, Mapping) else call
    called = function.get("name")
    if not isinstance(called, str) or not called:
        raise InputError(f"{where}: a call in {name} has no name; expected an object with name and arguments")
    arguments = function.get("arguments")
    if isinstance(arguments, str) and arguments.strip():
        parse_json(arguments, where, f"the arguments of {called} are text", "an object")
    if function is call and name != "tool_calls":
        return {"type": "function", "function": call}
    return call


def text_of(value: object, where: str, part: str) -> str:
    """A string, a number as JSON writes it, or a list of text parts, joined; "" for null.

    Raises:
        InputError: For anything else, and for text that is no Unicode.
    """
    if value is None:
        return ""
    if isinstance(value, list):
        return "".join(_part_text(item, where) for item in value)
    if is_number(value):
        if isinstance(value, float) and not math.isfinite(value):
            raise InputError(
                f"{where}: {part} is the number {value}, expected text; tables have it where a cell is empty: take "
                "such rows out"
            )
        return str(value)
    if not isinstance(value, str):
        raise InputError(f"{where}: {part} is a {type(value).__name__}, expected text")
    if not value.isascii() and _SURROGATE.search(value):
        raise InputError(f"{where}: {part} holds half of a surrogate pair (\\ud800 to \\udfff), which is no text")
    return value


def _part_text(item: object, where: str) -> str:
    if isinstance(item, str):
        return text_of(item, where, "content")
    if not isinstance(item, Mapping) or item.get("type", "text") != "text":
        kind = item.get("type") if isinstance(item, Mapping) else type(item).__name__
        raise InputError(f"{where}: content holds a part of type {kind!r}; only text parts can be trained on")
    text = item.get("text")
    text = item.get("value") if text is None else text
    if not isinstance(text, str):
        raise InputError(f"{where}: a text part has no text or value; expected {{type: text, text: ...}}")
    return text_of(text, where, "content")
