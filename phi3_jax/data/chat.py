"""Conversations through a checkpoint's own chat template, with the places of the assistant's words.

How the places are found, for any template. The template is rendered twice: with the conversation,
and with a placeholder for every content. The second rendering shows what the template writes
around the contents; walking along the first with it says where each content came to lie, also
where the template trims it. The text after an assistant's content up to the first special token
is what ends the turn.

How special tokens in a user's text stay text. The tokenizer works on a copy in which every special
token goes by a random name. What the *template* wrote is translated to these names, what stands
in the *contents* is not: there `<|end|>` is seven ordinary characters. Everything else about the
copy is the original, so that ordinary text gets exactly the ids that the tokenizer itself gives.
"""

import json
import re
import secrets
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Bool, Int
from numpy import ndarray

from phi3_jax.data.formats import Conversation, Example, Prerendered, Turn
from phi3_jax.data.template import render_chat
from phi3_jax.data.tokenizer import Tokenizer
from phi3_jax.system.errors import InputError
from phi3_jax.system.panic import telling_panics

if TYPE_CHECKING:
    from tokenizers import Encoding

MAX_TEXT = 2**23  # characters of a document, whose tokens take 1 GB while they are made; models have 131,072 positions


def check_length(text: str, where: str) -> None:
    """Looks at a text's length.

    Raises:
        InputError: For more characters than `MAX_TEXT`.
    """
    if len(text) > MAX_TEXT:
        raise InputError(f"{where}: has {len(text):,} characters, expected {MAX_TEXT:,} at most; cut it into several")


@dataclass(frozen=True)
class Span:
    """An assistant's turn in a rendered text.

    Attributes:
        start: Its first character.
        end: The end of the token that ends it.
        content: Its words, without that token.
        trained: Whether it is to be learnt from.
    """

    start: int
    end: int
    content: str
    trained: bool


@dataclass(frozen=True)
class Rendered:
    """A document for `ChatTokenizer.encode`.

    Attributes:
        where: Its name in error messages.
        text: Its characters, special tokens under their secret names.
        spans: The assistant's turns.
        dropped: How many turns the template left out.
        is_prerendered: Whether the row was text already.
    """

    where: str
    text: str
    spans: tuple[Span, ...]
    dropped: int = 0
    is_prerendered: bool = False


@dataclass(frozen=True)
class Encoded:
    """Tokens of a document.

    Attributes:
        ids: The tokens.
        starts: The first character that each covers.
        ends: The end of the last one.
        special: Which of them are special tokens.
    """

    ids: Int[ndarray, "tokens"]
    starts: Int[ndarray, "tokens"]
    ends: Int[ndarray, "tokens"]
    special: Bool[ndarray, "tokens"]

    def covered_by(self, span: Span) -> Bool[ndarray, "tokens"]:
        """Marks the tokens of a span.

        A word that holds also the blank before the span belongs to it. A special token that swallows
        the line break after itself, as `rstrip` makes Phi-3's do, does not.
        """
        touching = (self.starts < span.end) & (self.ends > span.start)
        return touching & ~(self.special & (self.starts < span.start))

    def first(self, span: Span) -> int:
        """Index of a span's first token: so many tokens come before it."""
        return int(self.covered_by(span).argmax())


@dataclass(frozen=True)
class _Frame:
    """What a template writes around the contents of turns with given roles.

    Attributes:
        literals: Each precedes the content of the turn with its number in `order`; the last one ends the document.
        order: The turns that the template writes.
        named: The literals with special tokens under their secret names, each split in what closes the turn before
            it (empty for all but the assistant's) and the rest.
    """

    literals: tuple[str, ...]
    order: tuple[int, ...]
    named: tuple[tuple[str, str], ...]


class ChatTokenizer:
    """Renders and tokenises with a transformers tokenizer, keeping track of the assistant's turns.

    Attributes:
        has_template: Whether messages can be rendered.

    Raises:
        InputError: For a tokenizer without a fast (Rust) implementation: only these tell which characters a token
            covers.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        if not getattr(tokenizer, "is_fast", False):
            raise InputError(
                f"the tokenizer is a {type(tokenizer).__name__} without a tokenizer.json; "
                "save it with transformers' fast tokenizer class"
            )
        self._tokenizer = tokenizer
        self.has_template = bool(getattr(tokenizer, "chat_template", None))
        # Digits, which no template changes. No text can hold them: nobody knows them beforehand.
        self._nonce = str(secrets.randbits(80))
        self._copy_backend()
        self._eos = self._names.get(tokenizer.eos_token or "", "")
        self._frames: dict[tuple[tuple[str, str | None], ...], _Frame] = {}
        probe = self._probe() if self.has_template else None
        self._opening, self._end = _markers(probe) if probe else ("", self._eos)
        begins = probe is not None and probe.literals[0].startswith(tokenizer.bos_token or "\0")
        wants_bos = begins or tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
        self._bos: int | None = tokenizer.bos_token_id if wants_bos else None

    @property
    def ends_turns(self) -> bool:
        """Whether a special token ends the assistant's turns, so that a model can learn to stop."""
        return bool(self._end)

    @property
    def turn_markers(self) -> str:
        """What pre-rendered text is searched for, as an error message shows it."""
        shown = f"{self._opening.rstrip()} ... {self._end}"
        for token, name in self._names.items():
            shown = shown.replace(name, token)
        return shown if self._opening else "nothing: no chat template tells the markers"

    def render(self, example: Example, where: str) -> Rendered:
        """Renders one row.

        A system turn that the template leaves out is counted in `dropped`. Blank assistant turns have no span.

        Args:
            example: The row.
            where: Its name in error messages.

        Raises:
            InputError: For a conversation that the template refuses, rewrites beyond trimming or has no place for,
                and for messages without a template.
        """
        if isinstance(example, Prerendered):
            return self._locate(example.text, where)
        if self.has_template:
            return self._render(example.turns, where)
        if example.is_prompt_completion:
            return self._join(example.turns, where)
        raise InputError(
            f"{where}: the tokenizer has no chat template to write messages with; give prompt/completion or "
            "text rows, or a checkpoint with a chat template"
        )

    def encode(self, documents: list[Rendered]) -> list[Encoded]:
        """Tokenises, with one BOS in front where the template or the tokenizer wants one.

        Raises:
            InputError: For texts that are too long or that the tokenizer gives up over, and for those that the
                tokenizer cannot write but as a special token.
        """
        if not documents:
            return []
        for document in documents:
            check_length(document.text, document.where)
        texts = [document.text for document in documents]
        where = documents[0].where if len(documents) == 1 else f"{documents[0].where} and following"
        with telling_panics(where, self._backend, texts):
            encodings = self._backend.encode_batch(texts, add_special_tokens=False)
        return [
            self._encoded(encoding, document.where) for encoding, document in zip(encodings, documents, strict=True)
        ]

    def prompt(self, turns: tuple[Turn, ...]) -> Int[ndarray, "tokens"]:
        """The tokens up to the answer to these turns: just what precedes it in a training row."""
        document = self.render(Conversation((*turns, Turn("assistant", "x"))), "the prompt")
        encoded = self.encode([document])[0]
        return encoded.ids[: encoded.first(document.spans[-1])]

    def _encoded(self, encoding: "Encoding", where: str) -> Encoded:
        ids = np.array(encoding.ids, np.int64)
        offsets = np.array(encoding.offsets, np.int64).reshape(-1, 2)
        if self._forged[ids].any():
            # Only a vocabulary that holds them as whole words does this; an error beats a forged turn.
            token = self._backend.id_to_token(int(ids[self._forged[ids]][0]))
            raise InputError(f"{where}: holds the text {token!r}, which this tokenizer cannot write but as the token")
        special, ids = self._special[ids], self._ids[ids]
        if self._bos is not None and (not ids.size or ids[0] != self._bos):
            ids, special = np.insert(ids, 0, self._bos), np.insert(special, 0, True)
            offsets = np.insert(offsets, 0, 0, axis=0)
        return Encoded(ids.astype(np.int32), offsets[:, 0], offsets[:, 1], special)

    def _copy_backend(self) -> None:
        """The copy with secret names, and arrays from its ids to the original's."""
        from tokenizers import Tokenizer as Backend

        spec = json.loads(self._tokenizer.backend_tokenizer.to_str())
        self._names: dict[str, str] = {}
        original_ids: dict[str, int] = {}
        for index, token in enumerate(spec["added_tokens"]):
            # Words that a user added with `add_tokens` are normalized, and stay words in any text.
            # Control tokens are special, or at least taken literally, as Phi-3's `</s>` is.
            if token["special"] or not token["normalized"]:
                name = f"<{self._nonce}:{index}>"
                self._names[token["content"]] = name
                token["content"] = name
            original_ids[token["content"]] = token["id"]
        self._backend = Backend.from_str(json.dumps(spec))
        self._backend.no_padding()
        self._backend.no_truncation()

        vocabulary = self._backend.get_vocab(with_added_tokens=True)
        self._ids = np.arange(max(vocabulary.values()) + 1)
        self._special = np.zeros(self._ids.shape, bool)
        self._forged = np.zeros(self._ids.shape, bool)
        for content, original in original_ids.items():
            self._ids[vocabulary[content]] = original
        for content, name in self._names.items():
            self._special[vocabulary[name]] = True
            if content in vocabulary and content != spec["model"].get("unk_token"):
                self._forged[vocabulary[content]] = True
        # The longest first, as the tokenizer itself looks for them.
        self._in_template = _any_of(sorted(self._names, key=len, reverse=True))
        self._in_document = _any_of(self._names.values())

    def _probe(self) -> _Frame | None:
        """A conversation that any template should take; a fussy one shows its markers nowhere."""
        try:
            return self._frame((Turn("user", "u"), Turn("assistant", "a")), "")
        except InputError:
            return None

    def _name_tokens(self, text: str) -> str:
        return self._in_template.sub(lambda match: self._names[match.group()], text)

    def _apply(self, messages: list[dict[str, str]], where: str) -> str:
        try:
            return render_chat(self._tokenizer, messages)
        except InputError as error:
            raise InputError(f"{where}: {error}") from error
        except Exception as error:  # a template can raise anything, most often what it says itself
            message = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise InputError(f"{where}: the chat template refuses the conversation ({message})") from error

    def _with_placeholders(self, turns: tuple[Turn, ...], where: str) -> tuple[tuple[str, ...], tuple[int, ...]]:
        """The texts that the template writes around the contents, and whose contents those are.

        Blank contents stay as they are: templates leave turns out by them.
        """
        messages = [
            {"role": turn.role, "content": f"{self._nonce}.{index}." if turn.content.strip() else turn.content}
            for index, turn in enumerate(turns)
        ]
        pieces = re.split(rf"{self._nonce}\.(\d+)\.", self._apply(messages, where))
        return tuple(pieces[::2]), tuple(int(index) for index in pieces[1::2])

    def _frame(self, turns: tuple[Turn, ...], where: str) -> _Frame:
        key = tuple((turn.role, None if turn.content.strip() else turn.content) for turn in turns)
        if key not in self._frames:
            literals, order = self._with_placeholders(turns, where)
            named = [("", self._name_tokens(literals[0]))]
            for literal, index in zip(literals[1:], order, strict=True):
                closing = self._closing(turns[: index + 1], where) if turns[index].role == "assistant" else ""
                if not literal.startswith(closing):
                    closing = ""
                named.append((self._name_tokens(closing), self._name_tokens(literal[len(closing) :])))
            self._frames[key] = _Frame(literals, order, tuple(named))
        return self._frames[key]

    def _closing(self, turns: tuple[Turn, ...], where: str) -> str:
        """What follows the last of the turns, up to the first special token (included) if it is near.

        Looked up where the conversation ends, so that no next turn's opening is taken for it.
        """
        try:
            literals, order = self._with_placeholders(turns, where)
        except InputError:
            return ""  # the template takes the whole conversation, but not this start of it
        if not order or order[-1] != len(turns) - 1:
            return ""
        match = self._in_template.search(literals[-1])
        return literals[-1][: match.end()] if match and not literals[-1][: match.start()].strip() else ""

    def _render(self, turns: tuple[Turn, ...], where: str) -> Rendered:
        frame = self._frame(turns, where)
        dropped = 0
        for index, turn in enumerate(turns):
            if turn.content.strip() and index not in frame.order:
                if turn.role != "system":
                    raise InputError(
                        f"{where}, turn {index + 1}: the chat template has no place for role {turn.role!r}"
                    )
                dropped += 1
        full = self._apply([{"role": turn.role, "content": turn.content} for turn in turns], where)
        contents = _as_written([turns[index].content for index in frame.order], full, frame.literals)
        if contents is None:
            raise InputError(
                f"{where}: the chat template rewrites the text of turns beyond trimming, so that targets cannot be "
                "placed; give rows of pre-rendered text"
            )
        text, spans = "".join(frame.named[0]), []
        for index, content, (closing, rest) in zip(frame.order, contents, frame.named[1:], strict=True):
            if turns[index].role == "assistant":
                end = len(text) + len(content) + len(closing)
                spans.append(Span(len(text), end, content, turns[index].trained))
            text += content + closing + rest
        return Rendered(where, text, tuple(spans), dropped)

    def _join(self, turns: tuple[Turn, ...], where: str) -> Rendered:
        """Prompt and completion as plain text, with the eos token at the end."""
        prompt = "\n\n".join(turn.content for turn in turns[:-1] if turn.content.strip())
        completion = turns[-1].content
        if prompt and not prompt[-1].isspace() and not completion[:1].isspace():
            prompt += "\n"
        text = prompt + completion + self._eos
        spans = (Span(len(prompt), len(text), completion, turns[-1].trained),) if completion.strip() else ()
        return Rendered(where, text, spans)

    def _locate(self, pre_rendered: str, where: str) -> Rendered:
        """Finds the assistant's turns in a text by the template's own special tokens."""
        text = self._name_tokens(pre_rendered)
        specials = list(self._in_document.finditer(text))
        if not specials or text[specials[-1].end() :].strip():
            text += self._eos  # plain text, or a last turn that nothing closes
        spans = []
        if self._opening:
            stem = self._opening.rstrip()
            blank = re.escape(self._opening[len(stem) :])
            for opening in re.finditer(f"{re.escape(stem)}(?:{blank})?", text):
                start = opening.end()
                closing = self._in_document.search(text, start)
                content_end = closing.start() if closing else len(text)
                content = text[start:content_end].strip()
                if content:
                    closes = closing is not None and closing.group() in (self._end, self._eos)
                    end = closing.end() if closing and closes else content_end
                    spans.append(Span(start, end, content, trained=True))
        return Rendered(where, text, tuple(spans), is_prerendered=True)


def _any_of(texts: Iterable[str]) -> re.Pattern[str]:
    # Without alternatives the pattern would match everywhere; (?!) never does.
    return re.compile("|".join(re.escape(text) for text in texts) or "(?!)")


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


def _markers(probe: _Frame) -> tuple[str, str]:
    """What opens and what ends an assistant's turn (secret names), from a user and an assistant turn."""
    if probe.order != (0, 1):
        return "", ""
    end = probe.named[2][0].lstrip()
    between = "".join(probe.named[1]).lstrip()
    return between.removeprefix(end).lstrip(), end
