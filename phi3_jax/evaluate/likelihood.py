"""Log-probabilities of given continuations, without the logits of whole sequences.

The trunk runs over a batch of padded rows; the output head only where a continuation's tokens are
predicted, and there in chunks, so that a row of any length needs no `[batch, seq, vocab]` array.
Requests that differ in their last token alone, as the letters of a multiple-choice question do,
share one row.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Int

from phi3_jax.data.vocabulary import check_ids
from phi3_jax.generation.answers import NOT_FINITE
from phi3_jax.lora import Lora
from phi3_jax.model.logits import adapted_logits, likeliest
from phi3_jax.model.phi3 import Phi3ForCausalLM
from phi3_jax.objectives.cross_entropy import token_losses
from phi3_jax.system.buckets import bucket, power
from phi3_jax.system.errors import InputError

Tokens = Sequence[int]


@dataclass(frozen=True)
class Score:
    """What a model makes of one continuation.

    Attributes:
        logprob: The sum of its tokens' log-probabilities.
        is_greedy: Whether each of its tokens is the most likely one.
    """

    logprob: float
    is_greedy: bool


def score_continuations(
    model: Phi3ForCausalLM,
    requests: Sequence[tuple[Tokens, Tokens]],
    *,
    lora: Lora | None = None,
    batch_size: int = 8,
    max_length: int | None = None,
) -> Iterator[tuple[int, Score]]:
    """The requests' indices and scores, as batches finish; the longest rows come first.

    Args:
        model: The model.
        requests: Context and continuation, each of at least one token. Where both together are longer than
            `max_length` + 1 (the last token is not read, only predicted), the context is cut on the left.
        lora: An adapter.
        batch_size: Rows in a forward pass.
        max_length: Tokens that the model reads; default: its positions.

    Raises:
        InputError: A context or continuation is empty or has a token that the model's embedding has no row for, a
            continuation is longer than `max_length`, or the model's logits are not finite.

    Example:
        >>> from flax import nnx
        >>> from phi3_jax.config.model import Phi3Config
        >>> sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
        >>> config = Phi3Config(**sizes, num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=32)
        >>> model = Phi3ForCausalLM(config, rngs=nnx.Rngs(0))
        >>> requests = [([1, 2, 3], [token]) for token in range(32)]
        >>> scores = dict(score_continuations(model, requests))
        >>> print(f"{sum(math.exp(score.logprob) for score in scores.values()):.3f}")
        1.000
        >>> sum(score.is_greedy for score in scores.values())
        1
    """
    limit = model.config.max_position_embeddings if max_length is None else max_length
    # Rows that are read, and who asks about them: index, number of tokens asked for, the last of them.
    rows: dict[tuple[int, ...], list[tuple[int, int, int]]] = {}
    for index, (context, continuation) in enumerate(requests):
        _check(index, context, continuation, limit)
        check_ids([*context, *continuation], model.config.vocab_size, f"request {index}")
        tokens = (*context, *continuation)[-(limit + 1) :]
        rows.setdefault(tokens[:-1], []).append((index, len(continuation), tokens[-1]))
    ordered = sorted(rows, key=lambda row: (-len(row), row))
    graph, state = nnx.split(model)
    size = min(batch_size, len(ordered))
    for start in range(0, len(ordered), max(size, 1)):
        part = ordered[start : start + size]
        batch = _pack(part, [rows[row] for row in part], size, limit)
        figures = jax.device_get(_batch_scores(graph, state, lora, *batch))
        for place, row in enumerate(part):
            for column, (index, asked, last) in enumerate(rows[row]):
                yield index, _read(figures, place, column, asked, last)


def _check(index: int, context: Tokens, continuation: Tokens, limit: int) -> None:
    if not context or not continuation:
        missing = "continuation" if context else "context"
        raise InputError(f"request {index}: its {missing} has no token of its own, expected one; leave it out")
    if len(continuation) > limit:
        raise InputError(
            f"request {index}: its continuation has {len(continuation)} tokens, and the model reads {limit}; leave it "
            "out, or raise max_length"
        )


def _pack(
    part: Sequence[tuple[int, ...]], asked: Sequence[Sequence[tuple[int, int, int]]], size: int, limit: int
) -> tuple[Int[np.ndarray, "batch seq"], Int[np.ndarray, "batch"], Int[np.ndarray, "batch candidates"], int]:
    """The last arguments of `_batch_scores`, in sizes that recur: each size is a compilation."""
    length = min(bucket(len(part[0])), limit)
    before_last = max(number - 1 for who in asked for _, number, _ in who)
    candidates = max(len(who) for who in asked)
    input_ids = np.zeros((size, length), np.int32)
    lengths = np.ones(size, np.int32)  # rows that fill the batch read one token
    lasts = np.zeros((size, power(candidates, 2)), np.int32)
    for place, (row, who) in enumerate(zip(part, asked, strict=True)):
        input_ids[place, : len(row)], lengths[place] = row, len(row)
        lasts[place, : len(who)] = [last for _, _, last in who]
    # Predicting more places than asked for costs little: the head is a small part of the model.
    inner = min(4 * power(math.ceil(before_last / 4), 4), length - 1) if before_last else 0
    return input_ids, lengths, lasts, inner


@partial(jax.jit, static_argnames=("graph", "inner"))
def _batch_scores(
    graph: nnx.GraphDef[Phi3ForCausalLM],
    state: nnx.State[str | int, object],
    lora: Lora | None,
    input_ids: Int[Array, "batch seq"],
    lengths: Int[Array, "batch"],
    lasts: Int[Array, "batch candidates"],
    inner: int,
) -> dict[str, Array]:
    """What the last places of each row, padded on the right, say of the tokens after them.

    Returns:
        `logprobs` and `hits` `[batch, inner]`: of the row's own last `inner` tokens, the log-probability
        and whether it is the most likely one. Where a row is shorter, its first entries mean nothing.
        `last_logprobs` `[batch, candidates]`, `guess` `[batch]`: of the token after the row, the
        log-probability of each candidate, and the most likely one.
    """
    model = nnx.merge(graph, state)
    real = jnp.arange(input_ids.shape[1]) < lengths[:, None]
    x = model.last_hidden_state(input_ids, attention_mask=real.astype(jnp.int32), lora=lora)  # [B, T, H]
    places = jnp.maximum(lengths[:, None] - 1 - inner + jnp.arange(inner + 1), 0)  # [B, inner + 1]
    x = jnp.take_along_axis(x, places[..., None], axis=1)
    logits = model.logits(x[:, -1:], lora)[:, 0]  # [B, V]
    chosen = jnp.take_along_axis(logits, lasts, axis=-1)
    figures = {
        "last_logprobs": chosen - jax.nn.logsumexp(logits, axis=-1, keepdims=True),
        "guess": likeliest(logits),
    }
    targets = jnp.take_along_axis(input_ids, jnp.minimum(places[:, :-1] + 1, input_ids.shape[1] - 1), axis=1)
    head, adapters = model.head(lora)
    losses, hits = (
        token_losses(x[:, :-1], head, targets, adjust=adapted_logits, adapters=adapters)
        if inner
        else (jnp.zeros(targets.shape), jnp.zeros(targets.shape, bool))
    )
    return {**figures, "logprobs": -losses, "hits": hits}


def _read(figures: Mapping[str, np.ndarray], place: int, column: int, asked: int, last: int) -> Score:
    """The score of one request, of `asked` tokens and `last` the last of them, from its batch's figures."""
    inner = slice(figures["logprobs"].shape[1] - (asked - 1), None)
    logprob = math.fsum([*figures["logprobs"][place, inner].tolist(), float(figures["last_logprobs"][place, column])])
    if not math.isfinite(logprob):
        raise InputError(NOT_FINITE)
    return Score(logprob, bool(figures["hits"][place, inner].all() and figures["guess"][place] == last))
