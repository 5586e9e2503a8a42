"""What a chat template is handed of a conversation, and whether it shows it.

Templates differ in where they look: for tools in the argument `tools` or in the system turn, for calls in
`tool_calls` or nowhere, for a call's arguments as an object or as its JSON text. A conversation is handed over in the
first way in which its text changes with what it holds; where there is no such way, the row is an error.
"""

import json
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product

from phi3_jax.data.anchors import TOOLS, Anchored, Anchors, Message
from phi3_jax.data.control_tokens import ControlTokens
from phi3_jax.data.formats import Conversation
from phi3_jax.data.template import may_read
from phi3_jax.data.template_process import Marked
from phi3_jax.data.turns import MUST_SHOW, REASONING_KEYS, Turn
from phi3_jax.data.ways import Attempt, functions, less, ways_of_calls, ways_of_tools, with_arguments
from phi3_jax.system.errors import InputError

# Renders messages, with what the template sees beside them.
Apply = Callable[[Sequence[Message], Mapping[str, object], str], Marked]

_HANDED = ("role", "content", "tools", "tool_calls")
# What a row cannot decide: they belong to the program, or would put another template in place of the checkpoint's.
_RESERVED = {"messages", "conversation", "conversations", "chat_template", "add_generation_prompt", "tools"}
_RESERVED |= {"continue_final_message", "return_assistant_tokens_mask", "documents", "tokenize", "return_dict"}


@dataclass(frozen=True)
class Handed:
    """A conversation as the template got it, and what it made of it.

    Attributes:
        messages: The turns, a message each, and one in front where tools needed a system turn.
        variables: What the template saw beside them.
        added: How many messages stand in front of the turns.
        text: The rendered text, guarded.
        generated: The places that the template marks as the assistant's; None where it marks none.
        passed_over: Keys of turns that neither the template nor this program reads.
        remarks: What was handed over in another way than it was given.
        anchors: Where the messages' texts lie in the text, where that was asked for and could be told.
    """

    messages: Sequence[Message]
    variables: Mapping[str, object]
    added: int
    text: str
    generated: list[tuple[int, int]] | None
    passed_over: tuple[str, ...] = ()
    remarks: tuple[str, ...] = ()
    anchors: Anchors | None = None


class Handover:
    """Hands conversations to a chat template.

    Args:
        control: The tokenizer's control tokens.
        apply: Renders.
        special: Names of the special tokens that the template sees, which no row may replace.
        literal_roles: Whose texts hold no control tokens.
        template: The template, of which there may be several one behind the other.
    """

    def __init__(
        self,
        control: ControlTokens,
        apply: Apply,
        special: Iterable[str],
        literal_roles: Iterable[str],
        template: str,
    ) -> None:
        self._control, self._apply, self._literal = control, apply, frozenset(literal_roles)
        self._reserved = _RESERVED.union(special)
        self._template = template
        self._tools_as_variable = may_read(template, "tools", is_variable=True)
        self._calls_as_key = may_read(template, "tool_calls")

    def __call__(self, conversation: Conversation, where: str, **variables: object) -> Handed:
        """Renders a conversation.

        Args:
            conversation: The turns, and what belongs to them.
            where: What error messages call it.
            **variables: For the template, such as `add_generation_prompt`.

        Raises:
            InputError: For what the template refuses, and for what it is given and does not show.
        """
        messages = [self._message(turn) for turn in conversation.turns]
        if _is_plain(conversation):
            return Handed(messages, variables, 0, *self._apply(messages, variables, where))
        given, seen = self._given(conversation, variables, where)
        handed = self._by_some_way(messages, given.get("tools"), seen, where)
        called = {function.get("name") for message in messages for function in functions(message)}
        return self._with_all_shown(handed, [name for name in seen if name not in variables], called, where)

    def first_asked(self, conversation: Conversation) -> list[tuple[Sequence[Message], Mapping[str, object]]]:
        """What is going to be rendered of a conversation first: messages, and what the template sees beside them."""
        messages = [self._message(turn) for turn in conversation.turns]
        if _is_plain(conversation):
            return [(messages, {})]
        try:
            given, seen = self._given(conversation, {}, "")
            attempt = next(self._attempts(messages, given.get("tools"), ""))
        except InputError:
            return []
        seen |= attempt.variables
        anchored = Anchored(attempt.messages, seen, self._control.nonce)
        return [(attempt.messages, seen), (anchored.messages, anchored.variables)]

    def _message(self, turn: Turn) -> Message:
        is_literal = turn.role in self._literal
        held: Message = {"role": turn.role}
        if turn.is_given or "tool_calls" not in turn.extra:
            held["content"] = self._control.guarded(turn.content, is_literal=is_literal)
        for key, value in turn.extra.items():
            held[key] = self._control.guarded(value, is_literal=is_literal)
        return held

    def _given(
        self, conversation: Conversation, variables: Mapping[str, object], where: str
    ) -> tuple[Mapping[str, object], dict[str, object]]:
        """What a row holds beside the turns, and what of it the template sees as variables."""
        settings = conversation.given.get("chat_template_kwargs", {})
        assert isinstance(settings, Mapping)
        if reserved := sorted(self._reserved.intersection(settings)):
            raise InputError(f"{where}: chat_template_kwargs sets {reserved[0]}, which no row can; take it out")
        role_of = {"tools": "system", "documents": "tool"}
        given = {
            name: self._control.guarded(value, is_literal=role_of.get(name) in self._literal)
            for name, value in conversation.given.items()
        }
        seen = dict(variables)
        if "documents" in given:
            seen["documents"] = given["documents"]
        settings = given.get("chat_template_kwargs")
        if isinstance(settings, Mapping):
            seen.update(settings)
        return given, seen

    def _attempts(self, messages: list[Message], tools: object, where: str) -> Iterator[Attempt]:
        """The ways of handing tools and calls over; always in this order, so that no row depends on another."""
        calls_ways = ways_of_calls(messages, self._control, as_key=self._calls_as_key)
        bare, tools_ways = ways_of_tools(messages, tools, where, as_variable=self._tools_as_variable)
        for to_calls, to_tools in product(calls_ways, tools_ways):
            yield to_tools(to_calls([dict(message) for message in bare]))

    def _by_some_way(
        self, messages: list[Message], tools: object, variables: Mapping[str, object], where: str
    ) -> Handed:
        """Tries how tools and calls can be handed over."""
        refused: InputError | None = None
        faults: list[str] = []
        for attempt in self._attempts(messages, tools, where):
            seen = {**variables, **attempt.variables}
            try:
                text, generated = self._render(attempt.messages, seen, where)
            except InputError as error:
                refused = refused or error
                continue
            anchors = self._anchors(attempt.messages, seen, text, where)
            fault = self._hidden(attempt, text, seen, anchors, where)
            if not fault and self._is_garbled(attempt.messages, text, seen, where):
                fault = "tool_calls"
            if not fault:
                return Handed(attempt.messages, seen, attempt.added, text, generated, (), attempt.remarks, anchors)
            faults.append(fault)
        if refused is not None and not faults:
            raise refused
        # Some ways do not show the tools; where one does, it is something else that no way shows.
        raise _not_shown(where, next((fault for fault in faults if fault != "tools"), "tools"))

    def _anchors(
        self, messages: Sequence[Message], variables: Mapping[str, object], text: str, where: str
    ) -> Anchors | None:
        anchored = Anchored(messages, variables, self._control.nonce)
        try:
            rendered = self._render(anchored.messages, anchored.variables, where)[0]
        except InputError:  # such as for arguments that the template wants to be a certain text
            return None
        return anchored.found_in(rendered, text)

    def _hidden(
        self, attempt: Attempt, text: str, variables: Mapping[str, object], anchors: Anchors | None, where: str
    ) -> str:
        """What of tools and calls is neither seen in the text nor changes it, "" where all is or does."""
        holders = [TOOLS, *(number for number, message in enumerate(attempt.messages) if "tools" in message)]
        if attempt.has_tools and not (anchors and any(anchors.shows(number, "tools") for number in holders)):
            without = {name: value for name, value in variables.items() if name != "tools"}
            if self._is_same(text, [less(message, "tools") for message in attempt.messages], without, where):
                return "tools"
        for number, message in enumerate(attempt.messages):
            turn = f"turn {number + 1 - attempt.added}"
            calls = message.get("tool_calls")
            if not isinstance(calls, list):
                continue
            for index in range(len(calls)):
                if anchors and (number, "tool_calls", index) in anchors.shown:
                    continue
                rest = calls[:index] + calls[index + 1 :]
                changed = {**less(message, "tool_calls"), **({"tool_calls": rest} if rest else {})}
                others = [*attempt.messages[:number], changed, *attempt.messages[number + 1 :]]
                if self._is_same(text, others, variables, where):
                    return f"tool_calls ({turn}, call {index + 1})" if rest else f"tool_calls ({turn})"
        return ""

    def _is_garbled(self, messages: Sequence[Message], text: str, variables: Mapping[str, object], where: str) -> bool:
        """Whether a call's arguments stand in the text as JSON of JSON text, or as Python writes an object."""
        for message in messages:
            for function in functions(message):
                arguments = function.get("arguments")
                if isinstance(arguments, str) and _is_twice_encoded(arguments, text):
                    # Of `{}` JSON differs by the quotes alone, which the template may write itself.
                    if json.dumps(arguments, ensure_ascii=False)[1:-1] != arguments:
                        return True
                    if self._encodes_text(messages, variables, where):
                        return True
                if isinstance(arguments, Mapping) and arguments:
                    python = str(arguments)
                    if python != json.dumps(arguments, ensure_ascii=False) and python in text:
                        return True
        return False

    def _encodes_text(self, messages: Sequence[Message], variables: Mapping[str, object], where: str) -> bool:
        """Whether the template writes arguments that are JSON text as JSON of that."""
        probe = json.dumps({self._control.nonce: 0})
        probed = with_arguments(messages, lambda _: probe)
        return _is_twice_encoded(probe, self._render(probed, variables, where)[0])

    def _with_all_shown(self, handed: Handed, settings: Sequence[str], called: Container[object], where: str) -> Handed:
        """Sees that what is left is shown, too. Raises `InputError` for what must be and is not."""
        self._check_settings(handed, settings, where)
        keys = list(dict.fromkeys(key for message in handed.messages for key in message if key not in _HANDED))
        passed_over = self._unread(handed, [key for key in keys if key not in MUST_SHOW], where)
        remarks = list(handed.remarks)
        for key in keys:
            if key not in MUST_SHOW:
                continue
            # An empty one says nothing that could be lost.
            holders = [number for number, held in enumerate(handed.messages) if held.get(key) not in (None, "", [], {})]
            hidden = [number for number in holders if self._is_hidden(handed, key, number, where)]
            if key == "name":
                # What answers a call may repeat its name, as OpenAI's old form must.
                repeated = [number for number in hidden if handed.messages[number][key] in called]
                hidden = [number for number in hidden if number not in repeated]
                passed_over += [key] if repeated else []
            # Templates leave the reasoning of earlier turns out, as the model gets it to see.
            is_read = key in REASONING_KEYS and (
                len(hidden) < len(holders) or (hidden and self._is_shown_last(handed, key, hidden[-1], where))
            )
            if hidden and not is_read:
                raise _not_shown(where, f"{key} (turn {hidden[0] + 1 - handed.added})")
            if hidden:
                remarks.append(f"the chat template leaves {key} of earlier turns out")
        return replace(handed, passed_over=tuple(passed_over), remarks=tuple(remarks))

    def _check_settings(self, handed: Handed, settings: Sequence[str], where: str) -> None:
        """Raises `InputError` for documents that are not shown, and settings that the template knows nothing of."""
        for name in settings:
            # A setting may say what the template does anyway.
            if name != "documents" and may_read(self._template, name, is_variable=True):
                continue
            without = {key: value for key, value in handed.variables.items() if key != name}
            if self._is_same(handed.text, handed.messages, without, where):
                raise _not_shown(where, "documents" if name == "documents" else f"chat_template_kwargs.{name}")

    def _unread(self, handed: Handed, keys: Sequence[str], where: str) -> list[str]:
        """Those of the keys without which the text is the same."""
        everywhere = range(len(handed.messages))
        plain = handed.messages
        for key in keys:
            plain = _less_in(plain, key, everywhere)
        if not keys or self._is_same(handed.text, plain, handed.variables, where):
            return list(keys)
        return [
            key
            for key in keys
            if self._is_same(handed.text, _less_in(handed.messages, key, everywhere), handed.variables, where)
        ]

    def _is_hidden(self, handed: Handed, key: str, number: int, where: str) -> bool:
        if handed.anchors and handed.anchors.shows(number, key):
            return False
        return self._is_same(handed.text, _less_in(handed.messages, key, {number}), handed.variables, where)

    def _is_shown_last(self, handed: Handed, key: str, number: int, where: str) -> bool:
        """Whether the template shows a key of a message where the conversation ends with it."""
        variables = {**handed.variables, "add_generation_prompt": False}
        said = handed.messages[: number + 1]
        try:
            text = self._render(said, variables, where)[0]
        except InputError:
            return False
        return not self._is_same(text, _less_in(said, key, {number}), variables, where)

    def _is_same(self, text: str, messages: Sequence[Message], variables: Mapping[str, object], where: str) -> bool:
        try:
            return self._render(messages, variables, where)[0] == text
        except InputError:  # the template cannot do without what was left out
            return False

    def _render(self, messages: Sequence[Message], variables: Mapping[str, object], where: str) -> Marked:
        try:
            return self._apply(messages, variables, where)
        except InputError:
            if all("content" in message for message in messages):
                raise
            # A template that wants a content everywhere, where a turn has calls alone.
            return self._apply([{"content": "", **message} for message in messages], variables, where)


def _is_plain(conversation: Conversation) -> bool:
    return not conversation.given and not any(turn.extra for turn in conversation.turns)


def _is_twice_encoded(arguments: str, text: str) -> bool:
    return json.dumps(arguments, ensure_ascii=False) in text


def _less_in(messages: Sequence[Message], key: str, numbers: Container[int]) -> list[Message]:
    return [less(message, key) if number in numbers else message for number, message in enumerate(messages)]


def _not_shown(where: str, what: str) -> InputError:
    key = what.partition(" ")[0].partition(".")[0]
    key = "tools, functions" if key == "tools" else key
    return InputError(
        f"{where}: has {what}, which the chat template does not show; give a checkpoint whose template does, or pass "
        f"it over with data.ignore_keys: [{key}]"
    )
