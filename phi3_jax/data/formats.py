"""From a row's columns to a conversation, whatever the data set calls them."""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from phi3_jax.system.errors import InputError
from phi3_jax.system.numbers import is_number

Row = Mapping[str, object]

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
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
}
# What a turn may hold that changes what the model sees, and that templates get no view of here.
_UNSUPPORTED = ("tool_calls", "function_call", "tools", "functions", "images", "audio")
_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class Turn:
    """One message. `trained` is False for an assistant's turn that the data says not to learn from."""

    role: str
    content: str
    trained: bool = True


@dataclass(frozen=True)
class Conversation:
    """Turns to be rendered with the chat template.

    Attributes:
        turns: In order.
        is_prompt_completion: Whether the row is one prompt and one answer by its very format, which makes sense also
            for a tokenizer without a chat template.
    """

    turns: tuple[Turn, ...]
    is_prompt_completion: bool = False


@dataclass(frozen=True)
class Prerendered:
    """A text that already holds whatever the chat template would write."""

    text: str


Example = Conversation | Prerendered


def read_row(row: Row, where: str, *, format: str = "auto", columns: Mapping[str, str] | None = None) -> Example:
    """Reads one row.

    Args:
        row: Columns and their values.
        where: The row's name in error messages.
        format: A key of `FORMATS`, or `auto`: the first of them whose columns the row has.
        columns: Which column plays which part, such as `{"prompt": "question", "completion": "answer"}`. Parts that
            are not named are the columns of their own name.

    Raises:
        InputError: Naming the row, for columns that fit no format, unknown roles and values of the wrong type.

    Example:
        >>> columns = {"prompt": "question", "completion": "answer"}
        >>> read_row({"question": "2 + 2?", "answer": 4}, "row 1", columns=columns)
        Conversation(turns=(Turn(role='user', content='2 + 2?', trained=True),
                            Turn(role='assistant', content='4', trained=True)),
                     is_prompt_completion=True)
    """
    parts = _map_columns(row, columns or {}, where)
    if format == "auto":
        format = _detect(parts, columns or {}, row, where)
    required, read = FORMATS[format]
    missing = [part for part in required if part not in parts]
    if missing:
        raise InputError(
            f"{where}: has the columns {_names(row)}; format {format} needs {', '.join(missing)}; "
            f"name it with data.columns, such as {{{missing[0]}: {next(iter(row), 'column')}}}"
        )
    return read(parts, where)


def _map_columns(row: Row, columns: Mapping[str, str], where: str) -> Row:
    parts = dict(row)
    for part, column in columns.items():
        if part not in PARTS:
            raise InputError(f"data.columns: {part!r} is no part of a row; expected some of {', '.join(PARTS)}")
        if column not in row:
            raise InputError(f"{where}: data.columns wants {column!r} as {part}, but the columns are {_names(row)}")
        parts[part] = row[column]
    return parts


def _detect(parts: Row, columns: Mapping[str, str], row: Row, where: str) -> str:
    # A table has all columns in every row; those of other formats than the row's are null.
    held = [part for part, value in parts.items() if value is not None]
    for there in (held, parts):
        fitting = [name for name, (required, _) in FORMATS.items() if all(part in there for part in required)]
        if fitting:
            break
    if fitting:
        # What the user named decides, before another format's column that happens to be there too.
        return max(fitting, key=lambda name: sum(part in columns for part in FORMATS[name][0]))
    expected = "; ".join(f"{name}: {' + '.join(required)}" for name, (required, _) in FORMATS.items())
    raise InputError(
        f"{where}: the columns {_names(row)} fit no format ({expected}); "
        "say which is which with data.columns, such as {prompt: question, completion: answer}"
    )


def _names(row: Row) -> str:
    return ", ".join(str(name) for name in row) or "(none)"


def _reader_of_turns(part: str) -> Callable[[Row, str], Example]:
    return lambda parts, where: Conversation((*_system(parts, where), *_turns(parts[part], where)))


def _read_alpaca(parts: Row, where: str) -> Example:
    prompt, extra = _text(parts["instruction"], where, "instruction"), _text(parts.get("input"), where, "input")
    if extra.strip():
        prompt = f"{prompt}\n\n{extra}"
    answer = _text(parts["output"], where, "output")
    return Conversation((*_system(parts, where), Turn("user", prompt), Turn("assistant", answer)), True)


def _read_prompt_completion(parts: Row, where: str) -> Example:
    prompt, completion = parts["prompt"], parts["completion"]
    if isinstance(prompt, list) and isinstance(completion, list):
        # TRL's conversational form: what stands in the prompt is context, never a target.
        context = [Turn(turn.role, turn.content, trained=False) for turn in _turns(prompt, where)]
        return Conversation((*_system(parts, where), *context, *_turns(completion, where)))
    turns = Turn("user", _text(prompt, where, "prompt")), Turn("assistant", _text(completion, where, "completion"))
    return Conversation((*_system(parts, where), *turns), True)


def _read_text(parts: Row, where: str) -> Example:
    return Prerendered(_text(parts["text"], where, "text"))


# In the order of detection: where several fit, the one that says most about the row comes first.
FORMATS: dict[str, tuple[tuple[str, ...], Callable[[Row, str], Example]]] = {
    "messages": (("messages",), _reader_of_turns("messages")),
    "sharegpt": (("conversations",), _reader_of_turns("conversations")),
    "alpaca": (("instruction", "output"), _read_alpaca),
    "prompt_completion": (("prompt", "completion"), _read_prompt_completion),
    "text": (("text",), _read_text),
}
PARTS = (*(part for required, _ in FORMATS.values() for part in required), "input", "system")


def _system(parts: Row, where: str) -> tuple[Turn, ...]:
    """The `system` column that ShareGPT and Alpaca files carry beside the turns."""
    text = _text(parts.get("system"), where, "system")
    return (Turn("system", text),) if text.strip() else ()


def _turns(value: object, where: str) -> tuple[Turn, ...]:
    if isinstance(value, str):  # a CSV cell, or a Parquet column of JSON text
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{where}: the turns are text that is not JSON ({error}); expected a list") from error
    if not isinstance(value, list):
        raise InputError(f"{where}: the turns are a {type(value).__name__}, expected a list of messages")
    return tuple(_turn(turn, f"{where}, turn {number}") for number, turn in enumerate(value, 1))


def _turn(turn: object, where: str) -> Turn:
    if not isinstance(turn, Mapping):
        raise InputError(f"{where}: is a {type(turn).__name__}, expected an object with role and content")
    for name in _UNSUPPORTED:
        if turn.get(name):
            raise InputError(f"{where}: has {name}, which is not supported yet; take such rows out")
    speaker = turn.get("role") or turn.get("from")
    role = ROLES.get(str(speaker).lower())
    if role is None:
        raise InputError(f"{where}: unknown role {speaker!r}; expected one of {', '.join(ROLES)}")
    content = turn.get("content")
    content = turn.get("value") if content is None else content
    weight = turn.get("loss_weight")
    weight = turn.get("weight") if weight is None else weight
    if weight not in (None, 0, 1):
        raise InputError(f"{where}: the loss weight is {weight!r}; expected 0 (no target) or 1")
    return Turn(role, _text(content, where, "content"), trained=weight != 0)


def _text(value: object, where: str, part: str) -> str:
    """A string, a number as JSON writes it, or a list of text parts, joined."""
    if value is None:
        return ""
    if isinstance(value, list):
        return "".join(_part_text(item, where) for item in value)
    if is_number(value):
        return str(value)
    if not isinstance(value, str):
        raise InputError(f"{where}: {part} is a {type(value).__name__}, expected text")
    if not value.isascii() and _SURROGATE.search(value):
        raise InputError(f"{where}: {part} holds half of a surrogate pair (\\ud800 to \\udfff), which is no text")
    return value


def _part_text(item: object, where: str) -> str:
    if isinstance(item, str):
        return _text(item, where, "content")
    if not isinstance(item, Mapping) or item.get("type", "text") != "text":
        kind = item.get("type") if isinstance(item, Mapping) else type(item).__name__
        raise InputError(f"{where}: content holds a part of type {kind!r}; only text parts can be trained on")
    text = item.get("text")
    text = item.get("value") if text is None else text
    if not isinstance(text, str):
        raise InputError(f"{where}: a text part has no text or value; expected {{type: text, text: ...}}")
    return _text(text, where, "content")
