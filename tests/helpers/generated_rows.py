"""Rows of chats as anybody may write them, and what transformers makes of them."""

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from hypothesis import strategies as st

from phi3_jax.config.sections import DataSection
from phi3_jax.data.chat import ChatTokenizer
from phi3_jax.data.row_tokenizer import Row, RowTokenizer
from phi3_jax.data.rows import DataStats
from phi3_jax.data.sources import Source
from tests.helpers.tokenizers import (
    APRIL,
    CHATML_TOKENS,
    JULY,
    PHI_3_5,
    PHI_3_TOKENS,
    PHI_4,
    PHI_4_MINI_TOKENS,
    PHI_4_TOKENS,
    bytes_tokenizer,
    phi3_tokenizer,
    phi4_mini_tokenizer,
    phi4_tokenizer,
)
from tests.helpers.tool_templates import (
    ENCODING_TOOLS,
    MARKED,
    MARKED_LAST,
    MARKED_TOOLS,
    THINKING,
    UNMARKED_TOOLS,
)


@dataclass(frozen=True)
class Kind:
    """A tokenizer, and the rows that its template has a place for.

    Attributes:
        tokenizer: With its template.
        turns: The tokens around turns, which stay text in every content.
        tokens: Others, which are tokens in what the assistant, the system and the tools say.
        has_system: Whether there are system turns.
        has_tools: Whether tools, calls and their results are shown.
        has_reasoning: Whether `reasoning_content` is.
        written: What becomes of a row before the template sees it, where it shows tools and calls nowhere else.
    """

    tokenizer: Any
    turns: tuple[str, ...]
    tokens: tuple[str, ...] = ()
    has_system: bool = True
    has_tools: bool = False
    has_reasoning: bool = False
    written: Callable[[Mapping[str, Any]], Mapping[str, Any]] = lambda row: row


PHI_3_TURNS = tuple(PHI_3_TOKENS)
CHATML_TURNS, CHATML_OTHERS = (
    ("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
    ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>"),
)


def kinds() -> dict[str, Kind]:
    """Of each template one."""
    phi_3 = ("</s>", "<unk>")
    mini = tuple(text for text, *_ in PHI_4_MINI_TOKENS if text not in PHI_3_TURNS)
    tools = Kind(
        bytes_tokenizer(UNMARKED_TOOLS, CHATML_TOKENS), CHATML_TURNS, CHATML_OTHERS, has_tools=True, has_reasoning=True
    )
    return {
        "april": Kind(phi3_tokenizer(APRIL), tuple(t for t in PHI_3_TURNS if t != "<|system|>"), phi_3),
        "july": Kind(phi3_tokenizer(JULY), PHI_3_TURNS, phi_3),
        "phi-3.5": Kind(phi3_tokenizer(PHI_3_5), PHI_3_TURNS, phi_3),
        "phi-4": Kind(phi4_tokenizer(PHI_4), tuple(PHI_4_TOKENS)),
        "phi-4-mini": Kind(phi4_mini_tokenizer(), PHI_3_TURNS, mini),
        "thinking": Kind(phi4_mini_tokenizer(THINKING), PHI_3_TURNS, mini, has_reasoning=True),
        "tools": tools,
        "encoding tools": replace(
            tools, tokenizer=bytes_tokenizer(ENCODING_TOOLS, CHATML_TOKENS), written=with_objects
        ),
        "phi-4-mini's tools": Kind(phi4_mini_tokenizer(), PHI_3_TURNS, mini, has_tools=True, written=as_phi4_mini),
        "marked": Kind(phi3_tokenizer(MARKED), PHI_3_TURNS, phi_3),
        "marked last": Kind(phi3_tokenizer(MARKED_LAST), PHI_3_TURNS, phi_3),
        "marked tools": replace(tools, tokenizer=bytes_tokenizer(MARKED_TOOLS, CHATML_TOKENS)),
    }


def rows(kind: Kind, *, literal: bool) -> st.SearchStrategy[dict[str, Any]]:
    """Rows of `messages`, and of `tools` and `chat_template_kwargs` where the template shows them.

    Args:
        kind: What the template has a place for.
        literal: Whether contents hold tokens that stay text.
    """
    return st.composite(_row)(kind, literal)


_WORDS = ("the 12 hen", "a", "héllo", "☃ 雪", " ", "  ", "\n", "\n\n", "<", "|>", "{}", "'\"\\", "<0x0A>", "1.50")


def _text(tokens: Iterable[str]) -> st.SearchStrategy[str]:
    pieces = st.lists(st.sampled_from([*_WORDS, *tokens]), min_size=1, max_size=6)
    return pieces.map("".join).filter(str.strip)


def _row(draw: Any, kind: Kind, literal: bool) -> dict[str, Any]:
    everything = (*kind.turns, *kind.tokens) if literal else ()
    user, other = _text(everything), _text((*kind.tokens, *(kind.turns if literal else ())))
    row: dict[str, Any] = {}
    messages = row["messages"] = []
    if kind.has_system and draw(st.booleans()):
        messages.append({"role": "system", "content": draw(other)})
    tools = kind.has_tools and draw(st.booleans())
    if tools:
        definitions = draw(st.lists(_tools(other), min_size=1, max_size=2))
        row["tools"] = draw(st.sampled_from([definitions, json.dumps(definitions)]))
        if kind.has_reasoning and draw(st.booleans()):
            row["chat_template_kwargs"] = {"style": "be brief"}
    for _ in range(draw(st.integers(1, 3))):
        messages.append({"role": "user", "content": draw(user)})
        for _ in range(draw(st.integers(0, 2)) if tools else 0):
            calls = draw(st.lists(_calls(other), min_size=1, max_size=2))
            content = draw(st.one_of(st.none(), st.just(""), other))
            messages.append(
                _reasoned(draw, kind, other, {"role": "assistant", "content": content, "tool_calls": calls})
            )
            messages.extend({"role": "tool", "content": draw(user), "tool_call_id": call["id"]} for call in calls)
        messages.append(_reasoned(draw, kind, other, {"role": "assistant", "content": draw(other)}))
    return row


def _reasoned(draw: Any, kind: Kind, text: st.SearchStrategy[str], turn: dict[str, Any]) -> dict[str, Any]:
    if kind.has_reasoning and draw(st.booleans()):
        turn["reasoning_content"] = draw(text)
    return turn


_NAMES = st.sampled_from(["weather", "get_time", "f"])


def _json(text: st.SearchStrategy[str]) -> st.SearchStrategy[Any]:
    plain = st.one_of(st.none(), st.booleans(), st.integers(-5, 5), st.sampled_from([1.5, 1e-9]), text)
    return st.recursive(plain, lambda inner: st.lists(inner, max_size=2) | _object(inner), max_leaves=4)


def _object(values: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    return st.dictionaries(st.sampled_from(["city", "n", "Ünit"]), values, max_size=2)


def _tools(text: st.SearchStrategy[str]) -> st.SearchStrategy[dict[str, Any]]:
    parameters = _object(st.fixed_dictionaries({"type": st.just("string"), "description": text}))
    return st.builds(
        lambda name, about, properties: {
            "type": "function",
            "function": {
                "name": name,
                "description": about,
                "parameters": {"type": "object", "properties": properties},
            },
        },
        _NAMES,
        text,
        parameters,
    )


def _calls(text: st.SearchStrategy[str]) -> st.SearchStrategy[dict[str, Any]]:
    """As OpenAI writes them: arguments as an object or as its JSON text."""
    return st.builds(
        lambda name, given, as_text: {
            "id": "call_1",
            "type": "function",
            "function": {"name": name, "arguments": json.dumps(given) if as_text else given},
        },
        _NAMES,
        _object(_json(text)),
        st.booleans(),
    )


def with_objects(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """A row whose calls have their arguments as objects."""
    row = json.loads(json.dumps(row))
    for turn in row["messages"]:
        for call in turn.get("tool_calls", ()):
            function = call["function"]
            if isinstance(function["arguments"], str):
                function["arguments"] = json.loads(function["arguments"])
    return row


def as_phi4_mini(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """A row with tools as text in the system turn, and calls behind the content."""
    row = dict(with_objects(row))
    tools = row.pop("tools", None)
    if tools is not None:
        if row["messages"][0]["role"] != "system":
            row["messages"].insert(0, {"role": "system", "content": ""})
        row["messages"][0]["tools"] = tools if isinstance(tools, str) else json.dumps(tools, ensure_ascii=False)
    for turn in row["messages"]:
        if calls := turn.pop("tool_calls", None):
            text = json.dumps([call["function"] for call in calls], ensure_ascii=False)
            turn["content"] = f"{turn['content'] or ''}<|tool_call|>{text}<|/tool_call|>"
    return row


def applied(kind: Kind, row: Mapping[str, Any]) -> list[int]:
    """The ids of `apply_chat_template`."""
    return list(_of_template(kind, kind.written(row), return_dict=False))


def _of_template(kind: Kind, row: Mapping[str, Any], **settings: bool) -> Any:
    """What `apply_chat_template` gives for a row."""
    tools = row.get("tools")
    return kind.tokenizer.apply_chat_template(
        row["messages"],
        tools=json.loads(tools) if isinstance(tools, str) else tools,
        tokenize=True,
        **settings,
        **row.get("chat_template_kwargs", {}),
    )


def expected(
    kind: Kind, row: Mapping[str, Any], literal_roles: tuple[str, ...] = ("user", "tool"), **options: Any
) -> list[int]:
    """The same, but that tokens which must stay text do.

    They are given to transformers as letters of no language, in whose place their own letters are put afterwards.
    """
    tokenizer, row = kind.tokenizer, kind.written(row)
    everywhere = {token: chr(0xE000 + i) for i, token in enumerate(kind.turns)}
    of_others = everywhere | {token: chr(0xE100 + i) for i, token in enumerate(kind.tokens)}
    messages = [_replaced(turn, of_others if turn["role"] in literal_roles else everywhere) for turn in row["messages"]]
    tools = row.get("tools")
    if tools is not None:
        options["tools"] = _replaced(json.loads(tools) if isinstance(tools, str) else tools, everywhere)
    options |= row.get("chat_template_kwargs", {})
    ids = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False, **options)
    for token, letter in of_others.items():
        ids = _exchanged(ids, _letters(tokenizer, letter), _letters(tokenizer, token))
    return ids


def _replaced(value: Any, letters: Mapping[str, str]) -> Any:
    if isinstance(value, dict):
        return {key: _replaced(item, letters) for key, item in value.items()}
    if isinstance(value, list):
        return [_replaced(item, letters) for item in value]
    if isinstance(value, str):
        for token in sorted(letters, key=len, reverse=True):
            value = value.replace(token, letters[token])
    return value


def _letters(tokenizer: Any, text: str) -> list[int]:
    """The ids of a text within another one, none of them an added token's."""
    if text.isascii():
        return [token.id for token in tokenizer.backend_tokenizer.model.tokenize(text)]
    around = tokenizer("<>", add_special_tokens=False)["input_ids"]
    return list(tokenizer(f"<{text}>", add_special_tokens=False)["input_ids"][len(around) - 1 : -1])


def _exchanged(ids: list[int], old: list[int], new: list[int]) -> list[int]:
    found, at = [], 0
    while at < len(ids):
        if ids[at : at + len(old)] == old:
            found += new
            at += len(old)
        else:
            found.append(ids[at])
            at += 1
    return found


def prepared(
    chat: ChatTokenizer, given: list[Mapping[str, Any]], **section: Any
) -> tuple[list[tuple[list[int], list[int]]], DataStats]:
    """Ids and targets of rows as training has them, and what was counted."""
    stats = DataStats()
    data = DataSection(train="rows", max_length=2**17, **section)
    source = Source("rows", given)
    found = RowTokenizer(chat, data, stats)(Row(source, index) for index in range(len(given)))
    return [(row.ids.tolist(), row.mask.tolist()) for row in found], stats


def shown(tokenizer: Any, ids: Iterable[int], mask: Iterable[int]) -> str:
    """The tokens, targets in brackets."""
    return "".join(f"[{tokenizer.decode([i])}]" if m else tokenizer.decode([i]) for i, m in zip(ids, mask, strict=True))


def assistant_mask(kind: Kind, row: Mapping[str, Any]) -> list[int]:
    """The targets that a template marks, but for the first token, which nothing predicts."""
    encoded = _of_template(kind, row, return_dict=True, return_assistant_tokens_mask=True)
    mask = np.array(encoded["assistant_masks"])
    mask[:1] = 0
    return mask.tolist()
