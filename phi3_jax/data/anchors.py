"""Anchors: numbers put around the texts of a conversation, which say where a template wrote them, and that it did.

A conversation is rendered once more with anchors in its texts. Where the text is the same but for the anchors, these
say whose each part of it is, whatever the template did to trim, escape, move or leave out.
"""

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from phi3_jax.data.turns import REASONING_KEYS

Message = dict[str, object]
# What an anchor stands around: a turn's content, its reasoning, the arguments of one of its calls, or the tools.
Part = tuple[int, str, int]
CALLED = "called"  # the name of a call whose arguments hold no text
TOOLS = -1  # stands for a turn's number where tools are the template's argument


@dataclass(frozen=True)
class Anchors:
    """Where the texts of a conversation came to lie.

    Attributes:
        spans: The first and last place of each turn's texts, by the turn's number; not of turns that show none.
        shown: What was written.
        sought: What has an anchor, and is not shown where it is not in `shown`.
    """

    spans: Mapping[int, tuple[int, int]]
    shown: frozenset[Part]
    sought: frozenset[Part]

    def shows(self, number: int, key: str) -> bool:
        """Whether every text under a turn's key, of which there is one, was written."""
        parts = [part for part in self.sought if part[:2] == (number, key)]
        return bool(parts) and self.shown.issuperset(parts)


class Anchored:
    """A conversation with anchors.

    Args:
        messages: The conversation.
        variables: What the template sees beside it.
        nonce: Digits that no text holds.

    Attributes:
        messages: With anchors in their texts.
        variables: With anchors in the tools.
    """

    def __init__(self, messages: Sequence[Message], variables: Mapping[str, object], nonce: str) -> None:
        self._nonce = nonce
        self._parts: list[Part] = []
        self.messages = [_with_anchors(message, number, self._marked) for number, message in enumerate(messages)]
        tools = variables.get("tools")
        self.variables = dict(variables)
        if isinstance(tools, list):
            self.variables["tools"] = _in_tools(tools, TOOLS, self._marked)

    def _marked(self, value: str, number: int, key: str, index: int = 0) -> str:
        core = value.strip()
        if not core:
            return value
        anchor = f"{self._nonce}{len(self._parts):06d}"
        self._parts.append((number, key, index))
        start = value.index(core)
        return value[:start] + anchor + core + anchor + value[start + len(core) :]

    def found_in(self, rendered: str, text: str) -> Anchors | None:
        """Where the anchors are.

        Args:
            rendered: What the template made of the conversation with them.
            text: What it made of that without.

        Returns:
            None where the template writes another text for the anchors.
        """
        found = re.split(rf"{self._nonce}(\d{{6}})", rendered)
        if "".join(found[::2]) != text:
            return None
        spans: dict[int, tuple[int, int]] = {}
        shown, position = set(), 0
        counts: Counter[Part] = Counter()
        for piece, index in zip(found[::2], found[1::2], strict=False):
            position += len(piece)
            part = self._parts[int(index)]
            # Results may repeat the name of what was called.
            is_repeated = part[1] == CALLED and counts[part] >= 2
            counts[part] += 1
            shown.add(part)
            if part[0] != TOOLS and part[1] != "tools" and not is_repeated:
                first, _ = spans.get(part[0], (position, position))
                spans[part[0]] = first, position
        return Anchors(spans, frozenset(shown), frozenset(self._parts))


def _with_anchors(message: Message, number: int, marked: Callable[..., str]) -> Message:
    seen = dict(message)
    for key in ("content", *REASONING_KEYS):
        value = message.get(key)
        if isinstance(value, str):
            seen[key] = marked(value, number, key)
    tools, calls = message.get("tools"), message.get("tool_calls")
    if isinstance(tools, str):
        seen["tools"] = marked(tools, number, "tools")
    elif isinstance(tools, list):
        seen["tools"] = _in_tools(tools, number, marked)
    if isinstance(calls, list):
        seen["tool_calls"] = [_in_call(call, number, index, marked) for index, call in enumerate(calls)]
    return seen


def _in_call(call: Mapping[str, object], number: int, index: int, marked: Callable[..., str]) -> Mapping[str, object]:
    function = call.get("function")
    if isinstance(function, Mapping):
        return {**call, "function": _in_call(function, number, index, marked)}
    arguments, is_done = _in_first(call.get("arguments"), lambda text: marked(text, number, "tool_calls", index))
    if is_done:
        return {**call, "arguments": arguments}
    name = call.get("name")
    return {**call, "name": marked(name, number, CALLED, index)} if isinstance(name, str) else call


def _in_tools(tools: list[object], number: int, marked: Callable[..., str]) -> list[object]:
    return [_in_tool(tool, number, index, marked) for index, tool in enumerate(tools)]


def _in_tool(tool: object, number: int, index: int, marked: Callable[..., str]) -> object:
    """With anchors around its name, which every template that shows tools writes."""
    if not isinstance(tool, Mapping):
        return tool
    if isinstance(tool.get("function"), Mapping):
        return {**tool, "function": _in_tool(tool["function"], number, index, marked)}
    name = tool.get("name")
    return {**tool, "name": marked(name, number, "tools", index)} if isinstance(name, str) else tool


def _in_first(value: object, marked: Callable[[str], str]) -> tuple[object, bool]:
    """The value with anchors around its first text that is not blank, and whether there is one."""
    if isinstance(value, str):
        return marked(value), bool(value.strip())
    if isinstance(value, Mapping):
        entries = dict(value)
        for key, item in value.items():
            entries[key], is_done = _in_first(item, marked)
            if is_done:
                return entries, True
    elif isinstance(value, list):
        for index, item in enumerate(value):
            found, is_done = _in_first(item, marked)
            if is_done:
                return [*value[:index], found, *value[index + 1 :]], True
    return value, False
