"""Small tokenizers: of letters, and like Phi-3's and Phi-4's with their chat templates (MIT, Microsoft)."""

from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from tests.helpers.models import VOCAB

# Phi-3-mini-4k-instruct, April 2024: BOS, system turns dropped, the assistant opened by the user's turn.
APRIL = (
    "{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') %}{{'<|user|>' + '\n' + "
    "message['content'] + '<|end|>' + '\n' + '<|assistant|>' + '\n'}}{% elif (message['role'] == 'assistant') %}"
    "{{message['content'] + '<|end|>' + '\n'}}{% endif %}{% endfor %}"
)
# Phi-3-mini-4k-instruct, July 2024: system turns, closed by eos.
JULY = (
    "{% for message in messages %}{% if message['role'] == 'system' %}{{'<|system|>\n' + message['content'] + "
    "'<|end|>\n'}}{% elif message['role'] == 'user' %}{{'<|user|>\n' + message['content'] + '<|end|>\n'}}"
    "{% elif message['role'] == 'assistant' %}{{'<|assistant|>\n' + message['content'] + '<|end|>\n'}}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
PHI_3_5 = JULY.replace("== 'system' %}", "== 'system' and message['content'] %}")
# Phi-4-mini-instruct: the tools as text in a key of the system turn.
PHI_4_MINI = (
    "{% for message in messages %}{% if message['role'] == 'system' and 'tools' in message and message['tools'] is not "
    "none %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|tool|>' + message['tools'] + '<|/tool|>' + "
    "'<|end|>' }}{% else %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% else %}{{ eos_token }}{% endif %}"
)
PHI_4 = (
    "{% for message in messages %}{% if (message['role'] == 'system') %}{{'<|im_start|>system<|im_sep|>' + "
    "message['content'] + '<|im_end|>'}}{% elif (message['role'] == 'user') %}{{'<|im_start|>user<|im_sep|>' + "
    "message['content'] + '<|im_end|><|im_start|>assistant<|im_sep|>'}}{% elif (message['role'] == 'assistant') %}"
    "{{message['content'] + '<|im_end|>'}}{% endif %}{% endfor %}"
)
# Not of the Phi family: trims contents, wants alternating turns.
TRIMMING = (
    "{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "{{ '<|' + message['role'] + '|>\n' + message['content'] | trim + ' <|end|>\n' }}{% endfor %}"
)

MERGES = [("▁", "t"), ("h", "e"), ("▁t", "he"), ("▁", "a"), ("a", "n"), ("1", "2"), ("▁", "▁")]
PHI_3_TOKENS = ["<|endoftext|>", "<|assistant|>", "<|system|>", "<|end|>", "<|user|>"]
PHI_4_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_sep|>", "<|im_end|>"]
# Phi-4-mini-instruct's added tokens in their order: text, `special`, `rstrip`; none is normalized.
PHI_4_MINI_TOKENS = (
    ("<|endoftext|>", True, False),
    ("<|endofprompt|>", True, False),
    ("<|assistant|>", True, True),
    ("<|end|>", True, True),
    ("<|user|>", True, True),
    ("<|system|>", True, True),
    ("<|tool|>", False, True),
    ("<|/tool|>", False, True),
    ("<|tool_call|>", False, True),
    ("<|/tool_call|>", False, True),
    ("<|tool_response|>", False, True),
    ("<|tag|>", True, True),
)
# As Qwen3's: the tokens of calls and reasoning are added, and not special.
CHATML_TOKENS = (
    *((token, True, False) for token in ("<|endoftext|>", "<|im_start|>", "<|im_end|>")),
    *((token, False, False) for token in ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")),
    *((token, False, False) for token in ("<think>", "</think>")),
)


def phi3_tokenizer(chat_template: str | None, *, add_bos: bool = False) -> Any:
    """Sentencepiece-like as Phi-3's: a blank before every piece, byte fallback, `rstrip` special tokens."""
    words = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁"]
    words += [chr(code) for code in range(33, 127)] + ["".join(merge) for merge in MERGES]
    vocab = {word: index for index, word in enumerate(dict.fromkeys(words))}
    backend = Tokenizer(models.BPE(vocab, MERGES, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens([AddedToken(token, normalized=False) for token in ("<unk>", "<s>", "<|endoftext|>")])
    backend.add_tokens([AddedToken("</s>", rstrip=True, normalized=False)])
    backend.add_special_tokens([AddedToken(token, rstrip=True, normalized=False) for token in PHI_3_TOKENS[1:]])
    if add_bos:
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="<|endoftext|>", pad_token="<|endoftext|>"
    )
    tokenizer.chat_template = chat_template
    return tokenizer


def phi4_tokenizer(chat_template: str, *, markers: list[str] = PHI_4_TOKENS) -> Any:
    """Byte-level as Phi-4's: no blank in front, BOS and eos the same token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("h", "e"), ("Ġ", "t"), ("Ġ", "Ġ"), ("Ġt", "he")]
    words = [*alphabet, *("".join(merge) for merge in merges)]
    backend = Tokenizer(models.BPE({word: index for index, word in enumerate(words)}, merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.ByteLevel(trim_offsets=True)
    backend.add_special_tokens([AddedToken(token, normalized=False) for token in markers])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<|endoftext|>", eos_token="<|endoftext|>", pad_token="<|endoftext|>"
    )
    tokenizer.chat_template = chat_template
    return tokenizer


def bytes_tokenizer(chat_template: str, tokens: Iterable[tuple[str, bool, bool]]) -> Any:
    """A token for every byte, and added ones: text, `special`, `rstrip`."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({letter: index for index, letter in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    for text, special, rstrip in tokens:
        token = AddedToken(text, special=special, rstrip=rstrip, normalized=False)
        (backend.add_special_tokens if special else backend.add_tokens)([token])
    eos = "<|endoftext|>"
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=eos, eos_token=eos, pad_token=eos)
    tokenizer.chat_template = chat_template
    return tokenizer


def phi4_mini_tokenizer(chat_template: str = PHI_4_MINI) -> Any:
    """Phi-4-mini's with its real template and flags, of bytes."""
    return bytes_tokenizer(chat_template, PHI_4_MINI_TOKENS)


def templates() -> dict[str, Any]:
    """A tokenizer for each template, by name."""
    return {
        "april": phi3_tokenizer(APRIL),
        "april with add_bos_token": phi3_tokenizer(APRIL, add_bos=True),
        "july": phi3_tokenizer(JULY),
        "july with add_bos_token": phi3_tokenizer(JULY, add_bos=True),
        "phi-3.5": phi3_tokenizer(PHI_3_5),
        "phi-4-mini": phi4_tokenizer(PHI_4_MINI, markers=PHI_3_TOKENS),
        "phi-4": phi4_tokenizer(PHI_4),
        "trimming": phi3_tokenizer(TRIMMING),
    }


TEMPLATE = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% else %}{{ eos_token }}{% endif %}"
)

LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789 "


def tiny_tokenizer(words: Mapping[str, int] = MappingProxyType({})) -> PreTrainedTokenizerFast:
    """A token for every letter, and Phi-3's special tokens; and these words, which may lie beyond the model's table."""
    specials = ["<pad>", "<s>", "<|endoftext|>", "<unk>", "<|user|>", "<|assistant|>", "<|end|>"]
    vocabulary = {token: i for i, token in enumerate([*specials, *LETTERS])}
    assert len(vocabulary) <= VOCAB
    backend = Tokenizer(models.WordLevel({**vocabulary, **words}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    backend.decoder = decoders.Fuse()
    backend.add_tokens(list(words))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="<|endoftext|>",
        unk_token="<unk>",
        additional_special_tokens=specials[4:],
    )
    tokenizer.chat_template = TEMPLATE
    return tokenizer
