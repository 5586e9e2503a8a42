"""Conversations through a checkpoint's own chat template, with the places of the assistant's words.

A row's ids are those of `apply_chat_template`, but for one thing: control tokens that stand in a user's or a tool's
text stay text there, and those that open and close turns in every text (see `control_tokens`).
"""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Int
from numpy import ndarray

from phi3_jax.config.sections import DataSection
from phi3_jax.data.anchors import Message
from phi3_jax.data.control_tokens import ControlTokens
from phi3_jax.data.delimiters import Delimiters, delimiters
from phi3_jax.data.encoded import Encoded
from phi3_jax.data.formats import Conversation, Prerendered, Tokens
from phi3_jax.data.handover import Handed, Handover
from phi3_jax.data.places import Place, Places
from phi3_jax.data.spans import GuardedText, Rendered, Span
from phi3_jax.data.template import has_process, look_ahead, render_marked
from phi3_jax.data.template_process import Marked
from phi3_jax.data.tokenizer import Tokenizer
from phi3_jax.data.turns import Turn
from phi3_jax.system.errors import InputError
from phi3_jax.system.panic import telling_panics

if TYPE_CHECKING:
    from tokenizers import Encoding

MAX_TEXT = 2**23  # characters of a document, whose tokens take 1 GB while they are made; models have 131,072 positions
AS_GIVEN = "prompt and completion are taken as they are, since data.template is none"
AS_RENDERED = "prompt and completion are taken as they are, since they hold the chat template's tokens"
AS_CHAT = "prompt and completion are rendered as a chat; data.template: none takes them as they are"
LITERAL_ROLES = ("user", "tool")


def check_length(text: str, where: str) -> None:
    """Looks at a text's length.

    Raises:
        InputError: For more characters than `MAX_TEXT`.
    """
    if len(text) > MAX_TEXT:
        raise InputError(f"{where}: has {len(text):,} characters, expected {MAX_TEXT:,} at most; cut it into several")


class ChatTokenizer:
    """Renders and tokenises with a transformers tokenizer, keeping track of the assistant's turns.

    Args:
        tokenizer: The checkpoint's.
        literal_roles: Whose texts hold no control tokens, whatever they look like.
        takes_strings: Whether prompt and completion as strings are taken as they are, joined with nothing in between
            and with the eos token behind them, and not rendered as a chat.
        final_eos: Whether text that does not end with the eos token gets it, and whether it is a target behind the
            last turn, as in TRL.

    Attributes:
        has_template: Whether messages can be rendered.

    Raises:
        InputError: For a tokenizer without a fast (Rust) implementation: only these tell which characters a token
            covers.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        literal_roles: Iterable[str] = LITERAL_ROLES,
        takes_strings: bool = False,
        final_eos: bool = False,
    ) -> None:
        if not getattr(tokenizer, "is_fast", False):
            raise InputError(
                f"the tokenizer is a {type(tokenizer).__name__} without a tokenizer.json; "
                "save it with transformers' fast tokenizer class"
            )
        self._tokenizer = tokenizer
        self._literal, self._takes_strings, self._final_eos = frozenset(literal_roles), takes_strings, final_eos
        self.has_template = bool(getattr(tokenizer, "chat_template", None))
        self._control = ControlTokens(tokenizer)
        self._eos = tokenizer.eos_token if tokenizer.eos_token and tokenizer.eos_token in self._control else ""
        self._places = Places(self._control, self._apply if self.has_template else None, self._eos)
        whole = str(tokenizer.chat_template or "")  # of several, all
        self._handover = Handover(self._control, self._apply, tokenizer.special_tokens_map, self._literal, whole)
        self._prompts = "add_generation_prompt" in whole
        self._looks_ahead = self.has_template and has_process(tokenizer)
        self._bos = tokenizer.bos_token_id
        # Also where it is the template that writes it: text is rendered like that.
        self._adds_bos = tokenizer("a")["input_ids"][:1] == [self._bos]
        self._begins_with_bos = self._adds_bos or self._places.begins.startswith(tokenizer.bos_token or "\0")

    @classmethod
    def of_section(cls, tokenizer: Tokenizer, data: DataSection) -> "ChatTokenizer":
        """One that reads rows as the section says."""
        return cls(
            tokenizer,
            literal_roles=data.literal_roles,
            takes_strings=data.template == "none",
            final_eos=data.final_eos,
        )

    @property
    def ends_turns(self) -> bool:
        """Whether a control token ends the assistant's turns, so that a model can learn to stop."""
        return bool(self._places.end)

    @property
    def turn_markers(self) -> str:
        """What pre-rendered text is searched for, as an error message shows it."""
        if not self._places.opening:
            return "nothing: no chat template tells the markers"
        return f"{self._places.opening.rstrip()} ... {self._places.end}"

    def render(self, example: Conversation | Prerendered, where: str) -> Rendered:
        """Renders one row.

        A system turn that the template leaves out is counted in `dropped`. Blank assistant turns have no span.

        Args:
            example: The row.
            where: Its name in error messages.

        Raises:
            InputError: For a conversation that the template refuses, does not show, rewrites beyond trimming or has no
                place for, and for messages without a template.
        """
        if isinstance(example, Prerendered):
            return self._locate(example.text, where)
        if example.strings and (self._takes_strings or self._is_rendered(*example.strings)):
            return self._as_given(*example.strings, where)
        if self.has_template:
            document = self._render(example, where)
            return replace(document, remarks=(*document.remarks, AS_CHAT)) if example.strings else document
        if example.is_prompt_completion and not example.given:
            return self._join(example.turns, where)
        raise InputError(
            f"{where}: the tokenizer has no chat template to write messages with; give prompt/completion or "
            "text rows, or a checkpoint with a chat template"
        )

    def look_ahead(self, examples: Sequence[Conversation | Prerendered | Tokens]) -> None:
        """Begins with rows that `render` is about to be given, since many at once take less time than each alone."""
        if self._looks_ahead:
            chats = [example for example in examples if isinstance(example, Conversation)]
            with suppress(InputError):  # which `render` raises again, for its row
                look_ahead(self._tokenizer, [asked for chat in chats for asked in self._handover.first_asked(chat)])

    def encode(self, documents: Sequence[Rendered]) -> list[Encoded]:
        """Tokenises, with one BOS in front of text that did not come from the template where one belongs there.

        Raises:
            InputError: For texts that are too long or that the tokenizer gives up over, and for those that the
                tokenizer cannot write but as a control token.
        """
        if not documents:
            return []
        for document in documents:
            check_length(document.text, document.where)
        where = documents[0].where if len(documents) == 1 else f"{documents[0].where} and following"
        found: list[Encoded | None] = [None] * len(documents)
        known = [delimiters(document, self._control) for document in documents]
        backend = self._control.backend
        with telling_panics(where, backend, [document.text for document in documents]):
            for encode, numbers in (
                (backend.encode_batch_fast, [number for number, each in enumerate(known) if each is not None]),
                (backend.encode_batch, [number for number, each in enumerate(known) if each is None]),
            ):
                encodings = encode([documents[number].text for number in numbers], add_special_tokens=False)
                for number, encoding in zip(numbers, encodings, strict=True):
                    found[number] = self._encoded(encoding, documents[number], known[number])
        return [encoded for encoded in found if encoded is not None]

    def prompt(
        self, turns: Sequence[Turn], given: Mapping[str, object] | None = None, where: str = "the prompt"
    ) -> Int[ndarray, "tokens"]:
        """The tokens up to the answer to these turns: just what precedes it in a training row.

        Args:
            turns: What was said.
            given: What the template gets beside them, as in `Conversation`.
            where: What error messages call it.

        Raises:
            InputError: As `render`.
        """
        given = given or {}
        handed = self._handover(Conversation(tuple(turns), given=given), where, add_generation_prompt=True)
        prompt = self.encode([Rendered(where, self._control.named(handed.text), ())])[0].ids
        stem = self._places.opening.rstrip()
        # Some templates know no cue: either a question ends with what opens the answer, or the answer brings it along.
        if self._prompts or (stem and handed.text.rstrip().endswith(stem)):
            return prompt
        document = self.render(Conversation((*turns, Turn("assistant", "x")), given=given), where)
        encoded = self.encode([document])[0]
        assert document.answer is not None
        is_all = document.text[: document.answer.start].rstrip() == self._control.named(handed.text).rstrip()
        return prompt if is_all else encoded.ids[: encoded.covered_by(document.answer)[0]]

    def guarded(self, role: str, text: str) -> str:
        """What somebody says, for a template that another program renders: `ids` gives the rendered text's tokens."""
        return self._control.guarded(text, is_literal=role in self._literal)

    def ids(self, text: str) -> list[int] | None:
        """The tokens of a text that holds `guarded` ones, without a BOS; None where it holds none.

        Raises:
            InputError: As `encode`.
        """
        if not self._control.has_guarded(text):
            return None
        found: list[int] = self.encode([Rendered("the text", self._control.named(text), ())])[0].ids.tolist()
        return found

    def decode(self, ids: Int[ndarray, "tokens"]) -> str:
        """The text of an answer's tokens, without special ones."""
        return self._tokenizer.decode(ids.tolist(), skip_special_tokens=True).strip()

    def _encoded(self, encoding: "Encoding", document: Rendered, known: Delimiters | None) -> Encoded:
        ids = np.array(encoding.ids, np.int64)
        if (forged := self._control.forged(ids)) is not None:
            # An error beats a forged turn.
            raise InputError(
                f"{document.where}: holds the text {forged!r}, which this tokenizer cannot write but as the token"
            )
        ids, special = self._control.original(ids)
        if document.wants_bos and self._bos is not None and (not ids.size or ids[0] != self._bos):
            return Encoded(np.insert(ids, 0, self._bos), np.insert(special, 0, True), encoding, 1, known)
        return Encoded(ids, special, encoding, 0, known)

    def _apply(self, messages: Sequence[Message], variables: Mapping[str, object], where: str) -> Marked:
        try:
            return render_marked(self._tokenizer, messages, variables)
        except InputError as error:
            raise InputError(f"{where}: {error}") from error
        except Exception as error:  # a template can raise anything, most often what it says itself
            message = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise InputError(f"{where}: the chat template refuses the conversation ({message})") from error

    def _render(self, conversation: Conversation, where: str) -> Rendered:
        handed = self._handover(conversation, where)
        places, dropped = self._turns(conversation, handed, where)
        text = GuardedText(self._control, handed.text)
        spans = {
            number: text.span(place, conversation.turns[number].trained)
            for number, place in places.items()
            if handed.text[place.start : place.content_end].strip()
        }
        last = spans[max(spans)] if spans else None
        completion: tuple[Span, ...] | None = None
        if conversation.completion is not None:
            completion = tuple(text.between(*part) for part in self._completion(conversation, places, handed.text))
        elif conversation.is_prompt_completion:
            completion = (last,) if last is not None and last.trained else ()
        if handed.generated is not None:
            off = [place for number, place in places.items() if not conversation.turns[number].trained]
            targets = tuple(text.marked(start, end, off) for start, end in handed.generated)
        elif conversation.completion is not None and completion is not None:
            targets = completion
        else:
            targets = tuple(spans[number] for number in sorted(spans))
        if self._final_eos and last is not None and last.trained:
            end = tuple(text.eos(self._eos, last))
            completion = completion and completion + end
            if handed.generated is None:  # marks say themselves where targets end
                targets += end
        return Rendered(
            where,
            text.named,
            targets,
            last,
            completion,
            dropped,
            is_literal=self._control.has_guarded(handed.text),
            passed_over=handed.passed_over,
            remarks=handed.remarks,
        )

    def _turns(self, conversation: Conversation, handed: Handed, where: str) -> tuple[dict[int, Place], int]:
        turns = conversation.turns
        try:
            return self._places.of_turns(turns, handed, where)
        except InputError:
            # The template's own marks need no places, but where turns are not to be learnt from.
            if handed.generated is None or not all(turn.trained for turn in turns if turn.role == "assistant"):
                raise
        return {}, 0

    def _completion(self, conversation: Conversation, places: Mapping[int, Place], text: str) -> list[tuple[int, int]]:
        """The parts of a text that are a conversational completion: all of it, as in TRL, less turns that are off."""
        begin = conversation.completion
        if begin is None or begin not in places:
            return []
        end = len(text.rstrip().removesuffix(self._eos)) if self._eos else len(text)
        parts, start = [], places[begin].start
        for number in range(begin, len(conversation.turns)):
            place = places.get(number)
            if place is not None and not conversation.turns[number].trained:
                parts.append((start, place.start))
                start = place.end
            elif place is not None:
                end = max(end, place.end)
        return [(first, last) for first, last in (*parts, (start, end)) if first < last]

    def _is_rendered(self, prompt: str, completion: str) -> bool:
        """Whether prompt and completion hold already what the template would write around them."""
        if not self.has_template:
            return False
        pattern, of_turns = self._control.pattern, self._control.of_turns
        begins, opening = pattern.match(prompt.lstrip()), self._places.opening.rstrip()
        if (begins and begins.group() in of_turns) or completion.rstrip().endswith(tuple(of_turns)):
            return True
        return opening != "" and prompt.rstrip().endswith(opening) and pattern.search(prompt) is not None

    def _as_given(self, prompt: str, completion: str, where: str) -> Rendered:
        """Prompt and completion as they are, with nothing in between and the eos token behind them."""
        text = self._control.named(prompt + completion)
        ends_itself = completion.rstrip().endswith(tuple(self._control.of_turns))
        if self._takes_strings or self._final_eos:
            ends_itself = bool(self._eos) and completion.endswith(self._eos)
        start = len(self._control.named(prompt))
        content = self._control.without_special(text[start:])
        text += "" if ends_itself else self._control.named(self._eos)
        span = (Span(start, len(text), content.strip(), True),) if completion else ()
        wants_bos = self._adds_bos if self._takes_strings else self._begins_with_bos
        answer = span[0] if span else None
        remarks = (AS_GIVEN if self._takes_strings else AS_RENDERED,)
        return Rendered(where, text, span, answer, span, is_prerendered=True, wants_bos=wants_bos, remarks=remarks)

    def _join(self, turns: Sequence[Turn], where: str) -> Rendered:
        """Prompt and completion as plain text, with the eos token at the end."""
        guarded = [self._control.guarded(turn.content, is_literal=True) for turn in turns]
        prompt = "\n\n".join(text for text in guarded[:-1] if text.strip())
        completion = guarded[-1]
        if prompt and not prompt[-1].isspace() and not completion[:1].isspace():
            prompt += "\n"
        whole = prompt + completion + self._eos
        text = GuardedText(self._control, whole)
        place = Place(len(prompt), len(prompt) + len(completion), len(whole))
        spans = (text.span(place, turns[-1].trained),) if completion.strip() else ()
        return Rendered(
            where,
            text.named,
            spans,
            spans[0] if spans else None,
            spans,
            is_literal=self._control.has_guarded(whole),
            wants_bos=self._begins_with_bos,
        )

    def _locate(self, pre_rendered: str, where: str) -> Rendered:
        """Finds the assistant's turns in a text by the template's own control tokens."""
        tokens = list(self._control.pattern.finditer(pre_rendered))
        ends_itself = bool(tokens) and not pre_rendered[tokens[-1].end() :].strip()
        if self._final_eos:
            ends_itself = bool(self._eos) and pre_rendered.endswith(self._eos)
        whole = pre_rendered if ends_itself else pre_rendered + self._eos
        text = GuardedText(self._control, whole)
        places = [place for place in self._places.in_text(whole) if whole[place.start : place.content_end].strip()]
        spans = [text.span(place, trained=True) for place in places]
        spans = [replace(span, content=span.content.strip()) for span in spans]
        last = spans[-1] if spans else None
        if self._final_eos and last:
            spans += text.eos(self._eos, last)
        return Rendered(where, text.named, tuple(spans), last, is_prerendered=True, wants_bos=self._begins_with_bos)
