"""A tokenizer's control tokens: where a text may hold them, and where the same characters stay text.

The tokenizer works on a copy of which every control token goes by a random name, which no text can hold. A text is
translated to these names before it is tokenised; what is not translated is tokenised as ordinary characters.
Everything else about the copy is the original, so that ordinary text gets exactly the ids that the tokenizer itself
gives.

Where control tokens in a value are to stay text, they are `guarded` before the chat template sees them: each goes by a
number that any template leaves as it is, and that turns into the token's characters, never the token, when the
rendered text is `named`.
"""

import json
import re
import secrets
from collections.abc import Iterable, Mapping
from typing import TypeVar

import numpy as np
from jaxtyping import Bool, Int
from numpy import ndarray

from phi3_jax.data.tokenizer import Tokenizer

Value = TypeVar("Value")


class ControlTokens:
    """The control tokens of a tokenizer, and its copy in which they go by other names.

    Args:
        tokenizer: With a fast (Rust) implementation.

    Attributes:
        nonce: Digits, which no template changes and no text holds, since nobody knows them beforehand.
        backend: The copy.
        pattern: Finds every control token in a text.
        can_be_counted: Whether a name is always the token, and never a part of a word.
        of_turns: Those that open and close turns, which no content may hold.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        from tokenizers import Tokenizer as Backend

        self.nonce = str(secrets.randbits(80))
        spec = json.loads(tokenizer.backend_tokenizer.to_str())
        self._names: dict[str, str] = {}
        self._dropped: list[str] = []
        self._swallows: dict[str, bool] = {}  # by name, whether it takes the blanks behind itself
        self.can_be_counted = True
        original_ids: dict[str, int] = {}
        for index, token in enumerate(spec["added_tokens"]):
            # Words that a user added with `add_tokens` are normalized, and stay words in any text.
            # Control tokens are special, or at least taken literally, as Phi-3's `</s>` is.
            if token["special"] or not token["normalized"]:
                name = f"<{self.nonce}:{index}>"
                self._names[token["content"]] = name
                if token["special"]:
                    self._dropped.append(name)
                self._swallows[name] = token["rstrip"]
                self.can_be_counted &= not token["single_word"]
                token["content"] = name
            original_ids[token["content"]] = token["id"]
        self.backend = Backend.from_str(json.dumps(spec))
        self.backend.no_padding()
        self.backend.no_truncation()

        vocabulary = self.backend.get_vocab(with_added_tokens=True)
        self._ids = np.arange(max(vocabulary.values()) + 1, dtype=np.int32)
        self._special = np.zeros(self._ids.shape, bool)
        self._forged = np.zeros(self._ids.shape, bool)
        for content, original in original_ids.items():
            self._ids[vocabulary[content]] = original
        for content, name in self._names.items():
            self._special[vocabulary[name]] = True
            if content in vocabulary and content != spec["model"].get("unk_token"):
                self._forged[vocabulary[content]] = True
        self._can_forge = bool(self._forged.any())
        # The longest first, as the tokenizer itself looks for them.
        self._contents = sorted(self._names, key=len, reverse=True)
        self._guards = {content: f"{self.nonce}-{index:06d}" for index, content in enumerate(self._contents)}
        self._guard = re.compile(rf"{self.nonce}-\d{{6}}")
        self.pattern = any_of(self._contents)
        self._any_name = re.compile(rf"<{self.nonce}:\d+>")
        self._either = re.compile(f"{self.pattern.pattern}|{self._guard.pattern}")
        self.special = any_of(self._dropped)
        self.of_turns: frozenset[str] = frozenset()
        self._turn_pattern = any_of(())

    def __contains__(self, content: object) -> bool:
        return content in self._names

    def set_of_turns(self, contents: Iterable[str]) -> None:
        """Says which tokens open and close turns."""
        self.of_turns = frozenset(contents)
        self._turn_pattern = any_of(sorted(self.of_turns, key=len, reverse=True))

    def guarded(self, value: Value, *, is_literal: bool) -> Value:
        """A value whose texts hold control tokens only where they may be tokens.

        Args:
            value: A text, or whatever JSON can write.
            is_literal: Whether no control token may be one, not only those of turns.

        Returns:
            The value itself where nothing had to be replaced.
        """
        pattern = self.pattern if is_literal else self._turn_pattern
        found: object = self._guarded(value, pattern)
        return found  # type: ignore[return-value]  # of the same type: texts stay texts

    def _guarded(self, value: object, pattern: re.Pattern[str]) -> object:
        if isinstance(value, str):
            return pattern.sub(lambda match: self._guards[match.group()], value) if pattern.search(value) else value
        if isinstance(value, Mapping):
            return {self._guarded(key, pattern): self._guarded(item, pattern) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self._guarded(item, pattern) for item in value]
        return value

    def has_guarded(self, text: str) -> bool:
        """Whether a text holds guarded tokens."""
        return self._guard.search(text) is not None

    def named(self, text: str) -> str:
        """A text for `backend`: control tokens by their names, guarded ones as characters."""
        return self._either.sub(lambda match: self._translation(match[0]), text)

    def named_with_shifts(self, text: str) -> tuple[str, list[int], list[int]]:
        """`named`'s text, and where it changes lengths: the ends of what it translates, and by how much all told."""
        pieces: list[str] = []
        ends, shifts, begin, total = [], [], 0, 0
        for match in self._either.finditer(text):
            found = match[0]
            name = self._translation(found)
            start, end = match.span()
            pieces += text[begin:start], name
            total += len(name) - len(found)
            ends.append(end)
            shifts.append(total)
            begin = end
        return "".join([*pieces, text[begin:]]), ends, shifts

    def ends(self, named: str) -> tuple[list[int], list[bool]]:
        """Where the control tokens of `named`'s text end, and whether each takes the blanks behind itself."""
        found = list(self._any_name.finditer(named))
        return [match.end() for match in found], [self._swallows[match[0]] for match in found]

    def _translation(self, found: str) -> str:
        name = self._names.get(found)
        return self._contents[int(found[-6:])] if name is None else name

    def shown(self, named: str) -> str:
        """The characters that a text has for a reader, from `named`'s."""
        if self.nonce in named:
            for content, name in self._names.items():
                named = named.replace(name, content)
        return named

    def without_special(self, named: str) -> str:
        """The same without special tokens, as a tokenizer decodes with `skip_special_tokens`."""
        return self.shown(self.special.sub("", named)) if self.nonce in named else named

    def forged(self, ids: Int[ndarray, "tokens"]) -> str | None:
        """The text of a control token that the copy could not write but as the token.

        Only a vocabulary that holds them as whole words does this.
        """
        if not self._can_forge:
            return None
        found = ids[self._forged[ids]]
        return self.backend.id_to_token(int(found[0])) if found.size else None

    def original(self, ids: Int[ndarray, "tokens"]) -> tuple[Int[ndarray, "tokens"], Bool[ndarray, "tokens"]]:
        """The tokenizer's own ids for those of the copy, and which of them are control tokens."""
        return self._ids[ids], self._special[ids]


def any_of(texts: Iterable[str]) -> re.Pattern[str]:
    """A pattern that finds any of these texts, and none where there are none.

    Example:
        >>> any_of(["<|end|>", "<s>"]).findall("a<s>b<|end|>")
        ['<s>', '<|end|>']
    """
    # Without alternatives the pattern would match everywhere; (?!) never does.
    return re.compile("|".join(re.escape(text) for text in texts) or "(?!)")
