"""From a row's columns to a conversation, whatever the data set calls them; no column is passed over in silence."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from jaxtyping import Bool, Int
from numpy import ndarray

from phi3_jax.data.column_names import suggested_columns
from phi3_jax.data.turns import MEDIA, list_of_objects, parse_json, read_tools, read_turns, text_of
from phi3_jax.data.turns import Turn as Turn
from phi3_jax.system.errors import InputError
from phi3_jax.system.numbers import is_number, is_whole
from phi3_jax.system.text import shown

Row = Mapping[str, object]


@dataclass(frozen=True)
class Conversation:
    """Turns to be rendered with the chat template.

    Attributes:
        turns: In order.
        is_prompt_completion: Whether the row is one prompt and one answer by its very format, which makes sense also
            for a tokenizer without a chat template.
        completion: The turn with which a conversational completion begins, all of which is to be learnt from; None
            where the assistant's turns are.
        given: What the template gets beside the turns: `tools` (a list or its JSON text), `documents` and the row's
            `chat_template_kwargs`.
        strings: Prompt and completion as the row has them, where these are two strings and no more.
    """

    turns: tuple[Turn, ...]
    is_prompt_completion: bool = False
    completion: int | None = None
    given: Mapping[str, object] = field(default_factory=dict)
    strings: tuple[str, str] | None = field(default=None, repr=False, compare=False)


@dataclass(frozen=True)
class Prerendered:
    """A text that already holds whatever the chat template would write."""

    text: str


@dataclass(frozen=True)
class Tokens:
    """A row that was tokenised elsewhere.

    Attributes:
        ids: Its tokens.
        mask: Which of them are targets.
    """

    ids: Int[ndarray, "tokens"]
    mask: Bool[ndarray, "tokens"]


Example = Conversation | Prerendered | Tokens


@dataclass
class Reading:
    """What was met in reading a row.

    Attributes:
        format: Its format.
        passed_over: Columns, and keys of turns, that nothing reads.
        remarks: What was taken in another way than a reader may think.
    """

    format: str = ""
    passed_over: list[str] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)


def read_row(
    row: Row,
    where: str,
    *,
    format: str = "auto",
    columns: Mapping[str, str] | None = None,
    ignored: Sequence[str] = (),
    reading: Reading | None = None,
) -> Example:
    """Reads one row.

    Args:
        row: Columns and their values.
        where: The row's name in error messages.
        format: A key of `FORMATS`, or `auto`: the first of them whose columns the row has.
        columns: Which column plays which part, such as `{"prompt": "question", "completion": "answer"}`. Parts that
            are not named are the columns of their own name.
        ignored: Columns, and keys of turns, that are passed over.
        reading: Takes what was met.

    Raises:
        InputError: Naming the row, for columns that fit no format, unknown roles, values of the wrong type, and
            columns whose meaning the format has no place for.

    Example:
        >>> columns = {"prompt": "question", "completion": "answer"}
        >>> read_row({"question": "2 + 2?", "answer": 4}, "row 1", columns=columns).turns[1].content
        '4'
    """
    reading = Reading() if reading is None else reading
    parts = _map_columns(row, columns or {}, where)
    # A column that is null in some rows, as tables have it, is none of these rows'.
    parts = {name: value for name, value in parts.items() if value is not None and name not in ignored}
    present = {**dict.fromkeys(_required({**row, **(columns or {})})), **parts}
    if format == "auto":
        format = _detect(parts, present, columns or {}, row, where)
    required, read = FORMATS[format]
    missing = [part for part in required if part not in present]
    if missing:
        raise InputError(
            f"{where}: has the columns {_names(row)}; format {format} needs {', '.join(missing)}; "
            f"name it with data.columns, such as {{{missing[0]}: {next(iter(row), 'column')}}}"
        )
    for name in MEDIA:
        if parts.get(name):
            raise InputError(f"{where}: has {name}, which a language model cannot see; take such rows out")
    used = (*required, *_OPTIONAL.get(format, ()))
    mapped = set((columns or {}).values()) - set(columns or {})
    for name in parts:
        if name not in used and name not in mapped and not _is_nothing(parts[name]):
            if name in _MEANT:
                raise InputError(
                    f"{where}: has the column {name}, which format {format} has no place for; take it out, or pass it "
                    f"over with data.ignore_keys: [{name}]"
                )
            reading.passed_over.append(name)
    reading.passed_over += [name for name in ignored if not _is_nothing(row.get(name))]
    reading.format = format
    return read(_Parts(present, where, tuple(ignored), reading))


@dataclass(frozen=True)
class _Parts:
    """A row by its parts, for a format's reader."""

    parts: Row
    where: str
    ignored: Sequence[str]
    reading: Reading

    def text(self, part: str) -> str:
        value = self.parts.get(part)
        if is_number(value):
            self.reading.remarks.append(f"{part} is a number, taken by its digits")
        return text_of(value, self.where, part)

    def turns(self, part: str) -> tuple[Turn, ...]:
        return read_turns(self.parts[part], self.where, self.ignored)

    def system(self) -> tuple[Turn, ...]:
        """The `system` column that ShareGPT and Alpaca files carry beside the turns."""
        text = self.text("system")
        return (Turn("system", text),) if text.strip() else ()

    def history(self) -> tuple[Turn, ...]:
        """Earlier questions and answers, as LLaMA-Factory and ms-swift have them."""
        pairs = self.parts.get("history")
        if isinstance(pairs, str) and pairs.strip():
            pairs = parse_json(pairs, self.where, "history is text", "a list of pairs")
        if _is_nothing(pairs):
            return ()
        if not isinstance(pairs, list) or not all(isinstance(pair, list | tuple) and len(pair) == 2 for pair in pairs):
            raise InputError(f"{self.where}: history is {shown(pairs)}, expected a list of [question, answer] pairs")
        turns = []
        for question, answer in pairs:
            turns.append(Turn("user", text_of(question, self.where, "history")))
            turns.append(Turn("assistant", text_of(answer, self.where, "history")))
        return tuple(turns)

    def conversation(self, turns: tuple[Turn, ...]) -> Conversation:
        """The turns behind the system column's, and what the template gets beside them."""
        first, system = turns[:1], self.system()
        if system and first and first[0].role == "system":
            if first[0].content.strip() != system[0].content.strip():
                raise InputError(
                    f"{self.where}: has a system column and a system turn, which differ; leave one out, or pass the "
                    "column over with data.ignore_keys: [system]"
                )
            system = ()
        return Conversation((*system, *turns), given=self._given())

    def _given(self) -> dict[str, object]:
        held = {name: self.parts.get(name) for name in ("tools", "functions")}
        read_tools(held, self.where)
        documents = self.parts.get("documents")
        if not _is_nothing(documents):
            held["documents"] = list_of_objects(documents, self.where, "documents")
        settings = self.parts.get("chat_template_kwargs")
        if isinstance(settings, str) and settings.strip():
            settings = parse_json(settings, self.where, "chat_template_kwargs is text", "an object")
        if not _is_nothing(settings):
            if not isinstance(settings, Mapping):
                raise InputError(f"{self.where}: chat_template_kwargs is {shown(settings)}, expected an object")
            held["chat_template_kwargs"] = {str(key): value for key, value in settings.items() if value is not None}
        return held


def _is_nothing(value: object) -> bool:
    """Whether a column holds nothing in this row: null, or something that is empty."""
    return value is None or (isinstance(value, str) and not value.strip()) or value in ([], {}, ())


def _required(row: Row) -> list[str]:
    """Columns of the row that some format requires, also where they are null."""
    required = {part for parts, _ in FORMATS.values() for part in parts}
    return [name for name in row if name in required]


def _map_columns(row: Row, columns: Mapping[str, str], where: str) -> dict[str, object]:
    parts = dict(row)
    for part, column in columns.items():
        if part not in PARTS:
            raise InputError(f"data.columns: {part!r} is no part of a row; expected some of {', '.join(PARTS)}")
        if column not in row:
            raise InputError(f"{where}: data.columns wants {column!r} as {part}, but the columns are {_names(row)}")
        parts[part] = row[column]
    return parts


def _detect(parts: Row, present: Row, columns: Mapping[str, str], row: Row, where: str) -> str:
    # Rows of several formats in one table have the others' columns too, as null.
    for known in (parts, present):
        fitting = [name for name, (required, _) in FORMATS.items() if all(part in known for part in required)]
        if "tokens" in fitting and not columns:
            return "tokens"  # whatever text it was made of
        if fitting:
            # What the user named decides, before another format's column that happens to be there too.
            return max(fitting, key=lambda name: sum(part in columns for part in FORMATS[name][0]))
    expected = "; ".join(f"{name}: {' + '.join(required)}" for name, (required, _) in FORMATS.items())
    advised = suggested_columns(row, PARTS) or {"prompt": "question", "completion": "answer"}
    example = ", ".join(f"{part}: {name}" for part, name in advised.items())
    raise InputError(
        f"{where}: the columns {_names(row)} fit no format ({expected}); "
        f"say which is which with data.columns, such as {{{example}}}"
    )


def _names(row: Row) -> str:
    return ", ".join(str(name) for name in row) or "(none)"


def _reader_of_turns(part: str) -> Callable[[_Parts], Example]:
    return lambda row: row.conversation(row.turns(part))


def _read_alpaca(row: _Parts) -> Example:
    prompt, extra = row.text("instruction"), row.text("input")
    if extra.strip():
        prompt = f"{prompt}\n\n{extra}"
    turns = (*row.history(), Turn("user", prompt), Turn("assistant", row.text("output")))
    return replace(row.conversation(turns), is_prompt_completion=True)


def _read_prompt_completion(row: _Parts) -> Example:
    prompt, completion = row.parts["prompt"], row.parts["completion"]
    if isinstance(prompt, list | Mapping) != isinstance(completion, list | Mapping):
        kinds = ["turns" if isinstance(value, list | Mapping) else "text" for value in (prompt, completion)]
        raise InputError(f"{row.where}: prompt is {kinds[0]} and completion {kinds[1]}; give turns or text for both")
    if isinstance(prompt, list) and isinstance(completion, list):
        # TRL's conversational form: what stands in the prompt is context, the completion is a target as a whole.
        context = (*row.history(), *(replace(turn, trained=False) for turn in row.turns("prompt")))
        said = row.turns("completion")
        if not said or said[0].role != "assistant":
            role = said[0].role if said else "nothing"
            raise InputError(f"{row.where}: the completion begins with {role}, expected a turn of the assistant")
        conversation = row.conversation((*context, *said))
        return replace(conversation, completion=len(conversation.turns) - len(said))
    asked, answered = row.text("prompt"), row.text("completion")
    found = row.conversation((*row.history(), Turn("user", asked), Turn("assistant", answered)))
    alone = len(found.turns) == 2 and not found.given
    return replace(found, is_prompt_completion=True, strings=(asked, answered) if alone else None)


def _read_text(row: _Parts) -> Example:
    return Prerendered(row.text("text"))


def _read_tokens(row: _Parts) -> Example:
    ids = _whole_numbers(row, "input_ids")
    if (ids < 0).any():
        raise InputError(f"{row.where}: input_ids has {ids.min()}, and no token has a negative id")
    real = np.ones(len(ids), bool)
    if "attention_mask" in row.parts:
        real = _beside(row, "attention_mask", ids, {0, 1}).astype(bool)
        if real.any() and not real[real.argmax() : len(real) - real[::-1].argmax()].all():
            raise InputError(f"{row.where}: attention_mask hides tokens between others; only padding can be taken off")
    mask = np.ones(len(ids), bool)
    if "labels" in row.parts:
        labels = _whole_numbers(row, "labels")
        if len(labels) != len(ids) or ((labels != ids) & (labels != -100)).any():
            raise InputError(f"{row.where}: labels are not input_ids with -100 where there is no target; mend the row")
        mask &= labels != -100
    for name in ("assistant_masks", "completion_mask"):
        if name in row.parts:
            mask &= _beside(row, name, ids, {0, 1}).astype(bool)
    return Tokens(ids[real], mask[real])


def _whole_numbers(row: _Parts, name: str) -> Int[ndarray, "tokens"]:
    values = row.parts[name]
    if isinstance(values, np.ndarray):
        values = values.tolist()
    if isinstance(values, str):
        values = parse_json(values, row.where, f"{name} is text", "a list of whole numbers")
    if not isinstance(values, list | tuple) or not all(is_whole(value) and abs(value) < 2**31 for value in values):
        raise InputError(f"{row.where}: {name} is {shown(values)}, expected a list of whole numbers")
    return np.array(values, np.int64)


def _beside(row: _Parts, name: str, ids: Int[ndarray, "tokens"], known: set[int]) -> Int[ndarray, "tokens"]:
    values = _whole_numbers(row, name)
    if len(values) != len(ids) or not set(values.tolist()) <= known:
        raise InputError(
            f"{row.where}: {name} has {len(values)} values for {len(ids)} tokens, expected a 0 or 1 for each"
        )
    return values


# In the order of detection: where several fit, the one that says most about the row comes first.
FORMATS: dict[str, tuple[tuple[str, ...], Callable[[_Parts], Example]]] = {
    "messages": (("messages",), _reader_of_turns("messages")),
    "sharegpt": (("conversations",), _reader_of_turns("conversations")),
    "alpaca": (("instruction", "output"), _read_alpaca),
    "prompt_completion": (("prompt", "completion"), _read_prompt_completion),
    "text": (("text",), _read_text),
    "tokens": (("input_ids",), _read_tokens),
}
_FOR_TEMPLATE = ("system", "tools", "functions", "documents", "chat_template_kwargs")
_OPTIONAL = {
    "tokens": ("labels", "attention_mask", "assistant_masks", "completion_mask"),
    "messages": _FOR_TEMPLATE,
    "sharegpt": _FOR_TEMPLATE,
    "alpaca": ("input", "history", *_FOR_TEMPLATE),
    "prompt_completion": ("history", *_FOR_TEMPLATE),
}
# Columns with a meaning: to drop one would be to train on another row than was written.
_MEANT = {"input", "history", *_FOR_TEMPLATE, "position_ids", "seq_lengths"}
PARTS = (
    *(part for required, _ in FORMATS.values() for part in required),
    *dict.fromkeys(part for parts in _OPTIONAL.values() for part in parts),
)
