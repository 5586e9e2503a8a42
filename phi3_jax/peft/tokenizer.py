"""Which tokenizer, with which chat template, goes with adapters: the base's, or one that they bring."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from filecmp import cmp
from functools import cached_property
from pathlib import Path

from phi3_jax.data.tokenizer import Tokenizer
from phi3_jax.hf.checkpoint import Checkpoint
from phi3_jax.hf.save_tokenizer import template_alone
from phi3_jax.hf.tokenizer import has_tokenizer, read_tokenizer, tokenizer_files
from phi3_jax.peft.adapter import PeftAdapter
from phi3_jax.system.errors import InputError
from phi3_jax.system.telling import tell


@dataclass(frozen=True, eq=False)
class BaseOfAdapters(Checkpoint):
    """A base whose tokenizer is the one that the adapters beside it were trained with.

    All that a command is asked with goes to base and adapters alike, so they share one.

    Attributes:
        adapters: What is going to be loaded beside it.
    """

    adapters: Sequence[PeftAdapter] = ()

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer that the adapters bring, else the base's; where they differ, a line on standard error says so.

        Raises:
            InputError: Where adapters bring different ones, and as `read_tokenizer`.
        """
        if not any(has_own(adapter) for adapter in self.adapters):
            return self._own
        tokenizers = [self.tokenizer_of(adapter) for adapter in self.adapters]
        for adapter, tokenizer in zip(self.adapters, tokenizers, strict=True):
            if found := differences(tokenizer, tokenizers[0]):
                raise InputError(
                    f"{adapter.name} goes with {found} than {self.adapters[0].name}, and all adapters are asked the "
                    "same here; name them one at a time"
                )
        found = self._differences(tokenizers[0])
        if found:
            names = " and ".join(adapter.name for adapter in self.adapters)
            tell(f"tokenizer: that of {names}, with {found} than the base's")
        return tokenizers[0]

    def tokenizer_of(self, adapter: PeftAdapter) -> Tokenizer:
        """What an adapter was trained with: its folder's tokenizer, or the base's with its folder's template."""
        if adapter.has_tokenizer:
            is_same = has_tokenizer(self.folder) and _are_same_files(adapter.folder, self.folder)
            return self._own if is_same else read_tokenizer(adapter.folder, adapter.name)
        template = template_alone(adapter.folder)
        if template is None or template == self._own.chat_template:
            return self._own
        tokenizer = self.own_tokenizer()
        tokenizer.chat_template = template
        return tokenizer

    def check_tokenizer(self, adapter: PeftAdapter) -> None:
        """Looks at an adapter that comes later. Raises `InputError` where it brings another tokenizer than is used."""
        if found := differences(self.tokenizer_of(adapter), self.tokenizer):
            raise InputError(f"{adapter.name} goes with {found} than what is in use here; start anew with it")

    @cached_property
    def _own(self) -> Tokenizer:
        return self.own_tokenizer()

    def _differences(self, tokenizer: Tokenizer) -> str:
        if not has_tokenizer(self.folder):
            return "" if tokenizer is self._own else "another tokenizer"
        return differences(tokenizer, self._own)


def has_own(adapter: PeftAdapter) -> bool:
    """Whether a tokenizer or a chat template lies in the adapter's folder."""
    return adapter.has_tokenizer or template_alone(adapter.folder) is not None


def differences(one: Tokenizer, other: Tokenizer) -> str:
    """What the first has that the second has otherwise, in words; empty where rows and answers are the same.

    Example:
        >>> from phi3_jax.hf.tokenizer import load_tokenizer
        >>> from phi3_jax.demo import demo_path
        >>> one, other = load_tokenizer(demo_path("base")), load_tokenizer(demo_path("base"))
        >>> differences(one, other)
        ''
        >>> one.chat_template = "{{ messages }}"
        >>> differences(one, other)
        'another chat template'
    """
    if one is other:
        return ""
    first, second = (json.loads(tokenizer.backend_tokenizer.to_str()) for tokenizer in (one, other))
    steps = ("normalizer", "pre_tokenizer", "post_processor", "decoder")
    found = {
        "another chat template": one.chat_template != other.chat_template,
        "other tokens": any(first[part] != second[part] for part in ("model", "added_tokens")),
        "another way with text": any(first[part] != second[part] for part in steps),
        "another end token": one.eos_token_id != other.eos_token_id,
        "another first token": one.bos_token_id != other.bos_token_id,
    }
    return " and ".join(name for name, differs in found.items() if differs)


def _are_same_files(one: Path, other: Path) -> bool:
    """Whether all that decides how a tokenizer reads and renders is the same, byte for byte."""
    names, others = ({file.relative_to(folder) for file in tokenizer_files(folder)} for folder in (one, other))
    return names == others and all(cmp(one / name, other / name, shallow=False) for name in names)
