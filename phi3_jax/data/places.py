"""Where the assistant's turns stand in a text, found by what the chat template writes around contents.

A turn runs from behind its opening to its own end token, whatever other control tokens lie in between. Both are learnt
from a short conversation. Since no content can hold a token that opens or closes a turn (`ControlTokens.guarded`), the
turns of a text are those between these tokens.

Conversations of plain turns are taken apart: rendered once with a placeholder for every content, and walking along both
says where each content came to lie. Where a template does more with a conversation than trim, and where there are
calls, results and reasoning, anchors in the texts themselves say so (see `anchors`).
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from phi3_jax.data.anchors import Anchored, Anchors, Message
from phi3_jax.data.control_tokens import ControlTokens, any_of
from phi3_jax.data.handover import Apply, Handed
from phi3_jax.data.markers import Markers, common_start, learn_markers, without_pairs
from phi3_jax.data.turns import Turn
from phi3_jax.system.errors import InputError


@dataclass(frozen=True)
class Place:
    """An assistant's turn in a text, by its characters.

    Attributes:
        start: The first behind its opening.
        content_end: The first behind its words.
        end: The first behind the token that ends it; `content_end` where none does.
    """

    start: int
    content_end: int
    end: int


@dataclass(frozen=True)
class _Frame:
    """What a template writes around the contents of messages.

    Attributes:
        literals: Each precedes the content of the message with its number in `order`; the last one ends the document.
        order: The messages whose content the template writes.
        closings: Of each in `order`, how the literal behind it closes the turn; "" for all but the assistant's.
    """

    literals: tuple[str, ...]
    order: tuple[int, ...]
    closings: tuple[str, ...]


class Places:
    """Finds the assistant's turns.

    Args:
        control: The tokenizer's control tokens; is told which of them open and close turns.
        apply: Renders messages, None without a template.
        eos: The token that ends documents, "" where there is none.

    Attributes:
        opening: What stands before an assistant's words, "" where that is not known.
        end: The control token that ends them, with what precedes it.
        begins: What the template writes before everything else.
    """

    def __init__(self, control: ControlTokens, apply: Apply | None, eos: str) -> None:
        self._control, self._apply, self._eos = control, apply, eos
        self._frames: dict[tuple[tuple[object, object], ...], _Frame] = {}
        self._ends = re.compile("(?!)")  # until it is known
        once = self._probe("user", "assistant")
        twice = self._probe("user", "assistant", "user", "assistant")
        self.begins = once.literals[0] if once else ""
        if once:
            literals = twice.literals if twice else None
            marks = learn_markers(control, once.literals, literals, once.closings[1], self._cue())
        else:
            marks = Markers("", "" if apply else eos)
        self.opening, self.end = marks.opening, marks.end
        probes = [probe for probe in (once, twice, self._probe("system", "user", "assistant")) if probe]
        # What precedes a last answer may be more than its opening, such as reasoning that is empty.
        written = "".join(text for probe in probes for text in (*probe.literals[:-2], probe.literals[-1]))
        written = without_pairs(control, written + self.opening + marks.inner + self.end)
        tokens = {*control.pattern.findall(written), *([eos] if eos in control else [])}
        control.set_of_turns(tokens)
        stem = self.opening.rstrip()
        self._opens = re.compile(f"{re.escape(stem)}(?:{re.escape(self.opening[len(stem) :])})?") if stem else None
        self._are_marked = control.pattern.search(self.opening) is not None
        # What stands between an opening and the words, such as a channel, does not end them.
        inner = set(control.pattern.findall(marks.inner)) - set(control.pattern.findall(self.opening + self.end))
        self._turn_token = any_of(sorted(tokens - inner, key=len, reverse=True))
        self._frames.clear()  # which knew no ends
        # The longest first: one end may be the beginning of another.
        self._ends = re.compile("|".join(map(re.escape, sorted(marks.ends, key=len, reverse=True))) or "(?!)")

    def in_text(self, text: str) -> list[Place]:
        """The assistant's turns of a text in which control tokens are what they seem."""
        found = []
        for opening in self._opens.finditer(text) if self._opens else ():
            closing = self._turn_token.search(text, opening.end())
            content_end = closing.start() if closing else len(text)
            ended = self._ends.match(text, content_end)
            end = ended.end() if ended else content_end
            if closing and not ended and closing.group() == self._eos:
                end = closing.end()
            found.append(Place(opening.end(), content_end, end))
        return found

    def of_turns(self, turns: Sequence[Turn], handed: Handed, where: str) -> tuple[dict[int, Place], int]:
        """Where the assistant's turns of a conversation came to lie in its text.

        Args:
            turns: The conversation.
            handed: What was made of it.
            where: What error messages call it.

        Returns:
            The places by the turns' numbers, without turns that the template leaves out, and how many system turns
            it leaves out.

        Raises:
            InputError: For a template that rewrites contents beyond trimming, or has no place for a role.
        """
        found, dropped = None, 0
        anchors = handed.anchors
        is_plain = all(message.keys() == {"role", "content"} for message in handed.messages)
        if is_plain:
            frame = self._frame(handed.messages, handed.variables, where)
            dropped = _dropped(turns, [number - handed.added for number in frame.order], where)
            found = self._by_frame(turns, handed, frame)
        if found is None and self._are_marked:
            anchors = anchors or self._anchors(handed, where)
            if anchors:
                order = [number - handed.added for number, key, _ in anchors.shown if key == "content"]
                dropped = _dropped(turns, order, where)
                found = self._by_anchors(turns, handed, anchors, where)
        if found is None and not is_plain:
            # A frame of its own for each such conversation would take a rendering for each of its turns.
            _, numbers = self._with_placeholders(handed.messages, handed.variables, where)
            dropped = _dropped(turns, [number - handed.added for number in numbers], where)
            if not any("tool_calls" in turn.extra for turn in turns):
                found = self._by_frame(turns, handed, self._frame(handed.messages, handed.variables, where))
        if found is None and self._are_marked:
            found = self._by_markers(turns, handed)
        if found is None:
            raise InputError(
                f"{where}: the chat template writes the turns in such a way that targets cannot be placed; give rows "
                "of pre-rendered text"
            )
        return found, dropped

    def _anchors(self, handed: Handed, where: str) -> Anchors | None:
        assert self._apply is not None
        anchored = Anchored(handed.messages, handed.variables, self._control.nonce)
        try:
            rendered = self._apply(anchored.messages, anchored.variables, where)[0]
        except InputError:
            return None
        return anchored.found_in(rendered, handed.text)

    def _by_anchors(
        self, turns: Sequence[Turn], handed: Handed, anchors: Anchors, where: str
    ) -> dict[int, Place] | None:
        """By where each turn's texts stand; None where these do not follow each other."""
        spans, text = anchors.spans, handed.text
        assert self._opens is not None
        openings = [(found.start(), found.end()) for found in self._opens.finditer(text)]
        found: dict[int, Place] = {}
        floor, waiting = 0, []
        for number in range(-handed.added, len(turns) + 1):
            span = spans.get(number + handed.added)
            speaks = 0 <= number < len(turns) and turns[number].role == "assistant"
            if span is None and number < len(turns):
                waiting += [number] if speaks else []
                continue
            first, last = span or (len(text), len(text))
            if first < floor:
                if speaks or found or waiting:
                    return None
                continue  # such as a system turn further back, which stands before all others
            within = [opening for opening in openings if floor <= opening[0] and opening[1] <= first]
            if waiting:
                # Turns without a text, such as calls without arguments, each with its opening, or left out.
                theirs = within[:-1] if speaks else within
                is_called = any("tool_calls" in turns[which].extra for which in waiting)
                if len(theirs) != len(waiting) and (theirs or is_called):
                    return None
                for index, (which, opening) in enumerate(zip(waiting, theirs, strict=False)):
                    limit = [*theirs, *(within[-1:] if speaks else [])][index + 1 : index + 2] or [(first, first)]
                    found[which] = self._place(handed, which, opening[1], opening[1], limit[0][0], where)
                within, waiting = within[len(theirs) :], []
            if speaks:
                before = found.get(number - 1)
                if within:
                    start = within[0][1]
                elif before and floor <= before.end <= first:
                    start = before.end
                else:
                    start = self._continued(handed, number, floor, first, where)
                after = [opening[0] for opening in openings if opening[0] >= last]
                following = [at for at, _ in spans.values() if at > last]
                limit_at = min([*following, *after, len(text)])
                found[number] = self._place(handed, number, start, last, limit_at, where)
            floor = last
        return found

    def _continued(self, handed: Handed, number: int, floor: int, first: int, where: str) -> int:
        """Where a turn without an opening begins, such as behind a tool's result: where its prompt ends."""
        assert self._apply is not None
        try:
            before = handed.messages[: number + handed.added]
            prompt = self._apply(before, {**handed.variables, "add_generation_prompt": True}, where)[0]
        except InputError:
            prompt = ""
        same = len(common_start([handed.text[:first], prompt]))
        if same >= floor and same == len(prompt):
            return same
        tokens = list(self._control.pattern.finditer(handed.text, floor, first))
        return tokens[-1].end() if tokens else first

    def _place(self, handed: Handed, number: int, start: int, last: int, limit: int, where: str) -> Place:
        """A turn that begins at `start`, whose words reach to `last` at least, and that ends before `limit`."""
        text = handed.text
        ended = self._ends.search(text, last, limit)
        behind = number + handed.added + 1
        is_followed = handed.messages[behind : behind + 1] and not _content(handed, number + 1)
        if ended and not is_followed:
            return Place(start, ended.start(), ended.end())
        # It may end otherwise, as calls do in some templates, or the end be that of a blank turn behind it: up to its
        # own end the conversation reads alike without the rest.
        try:
            alone = self._render_alone(handed, number, where)
        except InputError:
            alone = ""
        same = len(common_start([text[:limit], alone]))
        tokens = list(self._control.pattern.finditer(text, last, max(same, last)))
        if ended and (not tokens or ended.end() <= tokens[-1].end()):
            return Place(start, ended.start(), ended.end())
        end = tokens[-1].end() if tokens else last
        return Place(start, end, end)

    def _render_alone(self, handed: Handed, number: int, where: str) -> str:
        assert self._apply is not None
        return self._apply(handed.messages[: number + handed.added + 1], handed.variables, where)[0]

    def _by_markers(self, turns: Sequence[Turn], handed: Handed) -> dict[int, Place] | None:
        """None where what stands between markers is not plainly the conversation's, turn by turn."""
        places = self.in_text(handed.text)
        speaking = [number for number, turn in enumerate(turns) if turn.role == "assistant"]
        if len(places) != len(speaking):
            return None
        found = dict(zip(speaking, places, strict=True))
        for number, place in found.items():
            words = handed.text[place.start : place.content_end].strip()
            content = _content(handed, number)
            # Some templates leave a part of an earlier answer out, such as its reasoning.
            if content not in words and (not words or words not in content):
                return None
        others = [_content(handed, number) for number in range(len(turns)) if number not in found]
        outside = "".join(
            handed.text[end.end : start.start]
            for end, start in zip([Place(0, 0, 0), *places], [*places, Place(len(handed.text), 0, 0)], strict=True)
        )
        if not all(_as_json(text) in outside or text in outside for text in others):
            return None
        return found

    def _by_frame(self, turns: Sequence[Turn], handed: Handed, frame: _Frame) -> dict[int, Place] | None:
        """None where a content is neither as it was nor trimmed."""
        contents = [str(handed.messages[number].get("content", "")) for number in frame.order]
        written = _as_written(contents, handed.text, frame.literals)
        if written is None:
            return None
        found, position = {}, len(frame.literals[0])
        for index, content in enumerate(written):
            number, end = frame.order[index] - handed.added, position + len(content)
            if number >= 0 and turns[number].role == "assistant":
                # What else stands between opening and content is the turn's, too.
                literal = frame.literals[index]
                openings = list(self._opens.finditer(literal)) if self._opens else []
                start = position - (len(literal) - openings[-1].end() if openings else 0)
                found[number] = Place(start, end, end + len(frame.closings[index]))
            position = end + len(frame.literals[index + 1])
        return found

    def _probe(self, *roles: str) -> _Frame | None:
        """A conversation that any template should take; a fussy one shows its markers nowhere."""
        if self._apply is None:
            return None
        try:
            frame = self._frame([{"role": role, "content": "u"} for role in roles], {}, "")
        except InputError:
            return None
        return frame if len(frame.order) == len(roles) else None

    def _cue(self) -> str:
        """What stands behind a question where an answer is to follow, "" where the template knows no such thing."""
        asked: list[Message] = [{"role": "user", "content": "u"}]
        try:
            literals, order = self._with_placeholders(asked, {"add_generation_prompt": True}, "")
            bare, _ = self._with_placeholders(asked, {}, "")
        except InputError:
            return ""
        return literals[1] if len(order) == 1 and literals != bare else ""

    def _frame(self, messages: Sequence[Message], variables: Mapping[str, object], where: str) -> _Frame:
        is_plain = not variables and all(message.keys() == {"role", "content"} for message in messages)
        key = tuple((m["role"], None if str(m.get("content", "")).strip() else m.get("content")) for m in messages)
        if is_plain and key in self._frames:
            return self._frames[key]
        literals, order = self._with_placeholders(messages, variables, where)
        closings = []
        for literal, number in zip(literals[1:], order, strict=True):
            speaks = messages[number]["role"] == "assistant"
            closing = self._closing(messages[: number + 1], variables, where) if speaks else ""
            ended = self._ends.match(literal) if speaks else None
            if ended and (not literal.startswith(closing) or len(ended.group()) > len(closing)):
                closing = ended.group()
            closings.append(closing if literal.startswith(closing) else "")
        frame = _Frame(literals, order, tuple(closings))
        if is_plain:
            self._frames[key] = frame
        return frame

    def _closing(self, messages: Sequence[Message], variables: Mapping[str, object], where: str) -> str:
        """What follows the last of the messages, up to the first control token (included) if it is near.

        Looked up where the conversation ends, so that no next turn's opening is taken for it.
        """
        try:
            literals, order = self._with_placeholders(messages, variables, where)
        except InputError:
            return ""  # the template takes the whole conversation, but not this start of it
        if not order or order[-1] != len(messages) - 1:
            return ""
        match = self._control.pattern.search(literals[-1])
        return literals[-1][: match.end()] if match and not literals[-1][: match.start()].strip() else ""

    def _with_placeholders(
        self, messages: Sequence[Message], variables: Mapping[str, object], where: str
    ) -> tuple[tuple[str, ...], tuple[int, ...]]:
        """The texts that the template writes around the contents, and whose contents those are.

        Blank contents stay as they are: templates leave turns out by them.
        """
        assert self._apply is not None
        nonce = self._control.nonce
        replaced = [
            {**message, "content": f"{nonce}.{number}."} if str(message.get("content", "")).strip() else message
            for number, message in enumerate(messages)
        ]
        pieces = re.split(rf"{nonce}\.(\d+)\.", self._apply(replaced, variables, where)[0])
        return tuple(pieces[::2]), tuple(int(number) for number in pieces[1::2])


def _dropped(turns: Sequence[Turn], order: Sequence[int], where: str) -> int:
    """How many system turns a template leaves out. Raises `InputError` where it leaves another's words out."""
    dropped = 0
    for number, turn in enumerate(turns):
        if turn.content.strip() and number not in order:
            if turn.role != "system":
                what = "the text of a turn with tool_calls" if "tool_calls" in turn.extra else f"role {turn.role!r}"
                if not order:  # as templates of models that see
                    what = "any content that is text (it may want lists of parts)"
                raise InputError(f"{where}, turn {number + 1}: the chat template has no place for {what}")
            dropped += 1
    return dropped


def _content(handed: Handed, turn: int) -> str:
    return str(handed.messages[turn + handed.added].get("content", "")).strip()


def _as_json(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)[1:-1]


def _as_written(contents: Sequence[str], full: str, literals: Sequence[str]) -> list[str] | None:
    """The contents as they stand in `full` between `literals`: as given or trimmed. None if they do not."""
    if not full.startswith(literals[0]):
        return None
    position, found = len(literals[0]), []
    for content, literal in zip(contents, literals[1:], strict=True):
        for candidate in (content, content.strip(), content.rstrip(), content.lstrip()):
            if full.startswith(candidate + literal, position):
                found.append(candidate)
                position += len(candidate) + len(literal)
                break
        else:
            return None
    return found if position == len(full) else None
