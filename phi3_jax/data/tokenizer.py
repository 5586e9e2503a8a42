"""What this package needs of a tokenizer: transformers' fast ones have it."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from tokenizers import AddedToken
    from tokenizers import Tokenizer as Backend


class Tokenizer(Protocol):
    """A tokenizer as transformers' `PreTrainedTokenizerFast` is one (its `decode` takes batches, too).

    Attributes:
        is_fast: Whether it is one of the tokenizers library, which tells where in a text each token stands.
        backend_tokenizer: That library's own object.
        name_or_path: Where it was loaded from.
        special_tokens_map: The special tokens by their part, such as `bos_token`.
        added_tokens_decoder: The tokens that stand beside the model's vocabulary, by id.
    """

    chat_template: str | Mapping[str, str] | None

    @property
    def is_fast(self) -> bool: ...

    @property
    def backend_tokenizer(self) -> "Backend": ...

    @property
    def name_or_path(self) -> str: ...

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

    @property
    def added_tokens_decoder(self) -> Mapping[int, "AddedToken"]: ...

    def __len__(self) -> int:
        """How many tokens there are, those beside the model's vocabulary included."""
        ...

    def __call__(self, text: str, *, add_special_tokens: bool = True) -> Mapping[str, list[int]]:
        """The ids as `input_ids`, with BOS and the like unless `add_special_tokens` is False."""
        ...

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]: ...

    def decode(
        self,
        token_ids: int | Sequence[int],
        *,
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool = False,
    ) -> str: ...

    def get_vocab(self) -> dict[str, int]: ...

    def get_chat_template(self, chat_template: str | None = None, tools: object = None) -> str:
        """The template, or that for tools, where the tokenizer has one of its own for them."""
        ...

    def apply_chat_template(
        self,
        conversation: list[dict[str, str]],
        *,
        tokenize: bool,
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
    ) -> object:
        """The text, unless it is to be tokenised."""
        ...

    def save_pretrained(self, save_directory: str | Path) -> object: ...
