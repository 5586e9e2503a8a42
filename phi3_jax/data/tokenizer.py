"""What this package needs of a tokenizer: transformers' fast ones have it."""

from collections.abc import Mapping, Sequence
from typing import Protocol


class Tokenizer(Protocol):
    """A tokenizer as transformers' `PreTrainedTokenizerFast` is one."""

    @property
    def is_fast(self) -> bool:
        """Whether it is one of the tokenizers library, which tells where in a text each token stands."""
        ...

    @property
    def chat_template(self) -> str | Mapping[str, str] | None: ...

    @property
    def bos_token(self) -> str | None: ...

    @property
    def bos_token_id(self) -> int | None: ...

    @property
    def eos_token(self) -> str | None: ...

    @property
    def eos_token_id(self) -> int | None: ...

    @property
    def pad_token_id(self) -> int | None: ...

    @property
    def special_tokens_map(self) -> Mapping[str, str]: ...

    def get_vocab(self) -> dict[str, int]: ...

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = False) -> str: ...

    def convert_ids_to_tokens(self, ids: int) -> str: ...

    def save_pretrained(self, save_directory: str) -> object: ...
