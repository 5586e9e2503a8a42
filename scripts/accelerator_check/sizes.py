"""How large everything is: as on a card of 80 GB, or small enough for two cores."""

from dataclasses import dataclass, replace

from phi3_jax.config.model import Phi3Config


@dataclass(frozen=True)
class Sizes:
    """What is checked and measured.

    Attributes:
        model: Whose step and answers are timed.
        compared: The one that is compared with the CPU's, of fewer layers; its window is shorter than its rows.
        compared_tokens: Of its one row.
        attention_tokens: Of the rows that kernels are compared on.
        heads: Heads, key-value heads and width of each case for them.
        rows: Of a step.
        length: Of its rows; some are twice as long.
        steps: Timed ones, after as many others as there are of `warmup`.
        warmup: Before them.
        prompt: Tokens of a prompt.
        answer: Of an answer.
    """

    model: Phi3Config
    compared: Phi3Config
    compared_tokens: int
    attention_tokens: int
    heads: tuple[tuple[int, int, int], ...]
    rows: int
    length: int
    steps: int
    warmup: int
    prompt: int
    answer: int


_MINI = Phi3Config()

FULL = Sizes(
    model=_MINI,
    compared=replace(_MINI, num_hidden_layers=2, sliding_window=200),
    compared_tokens=512,
    attention_tokens=2048,
    heads=((4, 4, 96), (3, 1, 128)),
    rows=4,
    length=2048,
    steps=10,
    warmup=3,
    prompt=512,
    answer=128,
)
_TINY = replace(
    _MINI,
    vocab_size=512,
    hidden_size=64,
    intermediate_size=192,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    pad_token_id=None,
)
SMALL = Sizes(
    model=_TINY,
    compared=replace(_TINY, sliding_window=20),
    compared_tokens=64,
    attention_tokens=256,
    heads=((4, 2, 16),),
    rows=2,
    length=64,
    steps=2,
    warmup=1,
    prompt=16,
    answer=8,
)
