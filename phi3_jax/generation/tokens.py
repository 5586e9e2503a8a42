"""What single tokens write."""

from collections.abc import Sequence

from phi3_jax.data.tokenizer import Tokenizer
from phi3_jax.system.compat import step_state


def decode(tokenizer: Tokenizer, tokens: Sequence[int], skip_special_tokens: bool = True) -> str:
    """The text that tokens write, with every blank where the model put it."""
    return tokenizer.decode(tokens, skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False)


def special_ids(tokenizer: Tokenizer) -> frozenset[int]:
    """The tokens that decoding leaves out with `skip_special_tokens`."""
    return frozenset(index for index, token in tokenizer.added_tokens_decoder.items() if token.special)


def fallback_bytes(tokenizer: Tokenizer) -> dict[int, int]:
    """Of a sentencepiece vocabulary, the tokens that are single bytes (`<0x0A>`), and these bytes."""
    if not _decoder_has(tokenizer, "ByteFallback"):
        return {}
    vocabulary, names = tokenizer.get_vocab(), {f"<0x{byte:02X}>": byte for byte in range(256)}
    return {vocabulary[name]: byte for name, byte in names.items() if name in vocabulary}


class TokenBytes:
    """What each token writes in the middle of a text, as UTF-8; special tokens write their own names.

    Bytes and not characters, since one character may be written by several tokens.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._fallback = fallback_bytes(tokenizer)
        self._byte_of = _byte_level() if _decoder_has(tokenizer, "ByteLevel") and not self._fallback else {}
        # Decoders drop the blank in front of a text; behind a word it is kept.
        self._word = tokenizer("abcdef", add_special_tokens=False)["input_ids"]
        self._known: dict[int, bytes] = {}

    def __call__(self, token: int) -> bytes:
        """What the token writes; nothing for an id that the tokenizer does not know."""
        if token not in self._known:
            self._known[token] = self._bytes(token)
        return self._known[token]

    def _bytes(self, token: int) -> bytes:
        if token in self._fallback:
            return bytes([self._fallback[token]])
        name = self._tokenizer.backend_tokenizer.id_to_token(token)
        if name is None:
            return b""
        if self._byte_of and all(character in self._byte_of for character in name):
            return bytes(self._byte_of[character] for character in name)
        before, after = (decode(self._tokenizer, [*self._word, *more], False) for more in ((), (token,)))
        return after[len(before) :].encode()


def _decoder_has(tokenizer: Tokenizer, kind: str) -> bool:
    """Whether a step of the tokenizer's decoder is of this type; its state is JSON."""
    return f"'{kind}'" in repr(step_state(tokenizer.backend_tokenizer.decoder))


def _byte_level() -> dict[str, int]:
    """The byte that each character of a byte-level vocabulary stands for (GPT-2's table).

    Bytes that print stand for themselves, the others are, in order, the characters from 256 on.
    """
    printing = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printing]
    return {chr(byte): byte for byte in printing} | {chr(256 + i): byte for i, byte in enumerate(others)}
