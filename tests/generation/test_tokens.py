"""What single tokens write."""

from phi3_jax.generation.tokens import TokenBytes, fallback_bytes, special_ids
from tests.helpers.tokenizers import JULY, PHI_4, phi3_tokenizer, phi4_tokenizer


def test_bytes_of_words_fallbacks_and_special_tokens():
    tokenizer = phi3_tokenizer(JULY)
    ids, write = tokenizer.get_vocab(), TokenBytes(tokenizer)
    assert fallback_bytes(tokenizer)[ids["<0x0A>"]] == 10
    assert [write(ids[word]) for word in ("▁the", "<0xC3>", "<|end|>")] == [b" the", b"\xc3", b"<|end|>"]
    assert write(len(ids) + 5) == b""
    assert ids["<|end|>"] in special_ids(tokenizer)
    assert ids["a"] not in special_ids(tokenizer)


def test_a_byte_level_vocabulary_has_no_fallbacks():
    tokenizer = phi4_tokenizer(PHI_4)
    assert fallback_bytes(tokenizer) == {}
    assert TokenBytes(tokenizer)(tokenizer.get_vocab()["Ġthe"]) == b" the"
