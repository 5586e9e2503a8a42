"""The next token out of the logits: repetition penalty, temperature, top-k, top-p, min-p, and the draw."""

from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Bool, Float, Int, PRNGKeyArray

from phi3_jax.config.generation import GenerationConfig
from phi3_jax.model.logits import likeliest
from phi3_jax.system.buckets import power
from phi3_jax.system.errors import InputError

# A nucleus, and what min-p leaves, is looked for among so many tokens before the whole vocabulary is sorted.
_CANDIDATES = 512
# A draw takes a block of so many tokens first, then one of its tokens: random numbers are costly.
_BLOCK = 256


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Sampler:
    """Which filters are on, and their numbers.

    Other numbers are other arguments to the same program; another choice of filters is another program, since a
    filter that is off is None.

    Attributes:
        repetition_penalty: As in `GenerationConfig`, as are the others, or None.
        temperature: What the logits are divided by.
        top_k: How many tokens are left.
        left_out: What is left out may have that probability together at most: 1 - top_p.
        min_p: The share of the likeliest one's that they have.
        candidates: How many of the highest logits are looked at first. More than `top_k`.
        least: Each filter leaves at least so many tokens; in beam search one that does not end the answer.
    """

    repetition_penalty: Float[Array, ""] | None = None
    temperature: Float[Array, ""] | None = None
    top_k: Int[Array, ""] | None = None
    left_out: Float[Array, ""] | None = None
    min_p: Float[Array, ""] | None = None
    candidates: int = field(default=_CANDIDATES, metadata={"static": True})
    least: int = field(default=1, metadata={"static": True})

    @classmethod
    def from_settings(cls, settings: GenerationConfig) -> "Sampler":
        """The filters that `settings` turn on: without `do_sample` none but the penalty, as in transformers."""

        def number(value: float, on: bool) -> Array | None:
            return jnp.asarray(value, jnp.float32) if on else None

        draws = settings.do_sample
        limited = draws and settings.top_k > 0
        least = max(2, 1 + len(settings.eos_token_id)) if settings.num_beams > 1 else 1
        return cls(
            repetition_penalty=number(settings.repetition_penalty, settings.repetition_penalty != 1),
            temperature=number(settings.temperature, draws and settings.temperature != 1),
            top_k=jnp.asarray(settings.top_k, jnp.int32) if limited else None,
            # Rounded once, as transformers' is.
            left_out=number(1 - settings.top_p, draws and settings.top_p < 1),
            min_p=number(settings.min_p, draws and settings.min_p > 0),
            # A power of two, so that most changes of top_k are no other program.
            candidates=max(64, power(max(settings.top_k, least) + 1)) if limited else _CANDIDATES,
            least=least,
        )


def row_keys(seed: int | tuple[int, ...], prompts: int, num_return_sequences: int = 1) -> PRNGKeyArray:
    """One key for each answer, `[prompts * num_return_sequences]`, those of a prompt side by side.

    With one seed for each prompt, an answer's key does not depend on the prompt's place in the batch.

    Raises:
        InputError: Where the number of seeds is not that of prompts, and for seeds that do not fit into 32 bits.
    """
    seeds = seed if isinstance(seed, tuple) else (seed,)
    wrong = [value for value in seeds if not 0 <= value < 2**32]
    if wrong:
        raise InputError(f"seed is {wrong[0]}, expected 0 to {2**32 - 1}")
    if isinstance(seed, tuple) and len(seeds) != prompts:
        raise InputError(f"seed has {len(seeds)} numbers for {prompts} prompts; give one for each prompt, or one")
    # The keys of other generators (rbg) do not keep rows apart where a draw is vectorized.
    keys = jax.vmap(lambda value: jax.random.key(value, impl="threefry2x32"))(np.asarray(seeds, np.uint32))
    if not isinstance(seed, tuple):
        keys = jax.vmap(jax.random.fold_in, (None, 0))(keys[0], jnp.arange(prompts))
    answers = jnp.arange(num_return_sequences)
    return jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)), (0, None))(keys, answers).reshape(-1)


def step_keys(keys: PRNGKeyArray, step: Int[ArrayLike, ""]) -> PRNGKeyArray:
    """The keys `[rows]` of one token of the answers."""
    return jax.vmap(jax.random.fold_in, (0, None))(keys, step)


def seen_tokens(
    input_ids: Int[Array, "rows prompt"], attention_mask: Int[Array, "rows prompt"], vocab: int
) -> Bool[Array, "rows vocab"]:
    """Which tokens are in each prompt, padding left out."""
    rows = jnp.arange(input_ids.shape[0])[:, None]
    # Padding goes beyond the vocabulary, where nothing is set.
    tokens = jnp.where(attention_mask != 0, input_ids, vocab)
    return jnp.zeros((input_ids.shape[0], vocab), bool).at[rows, tokens].set(True, mode="drop")


def add_seen(seen: Bool[Array, "rows vocab"], tokens: Int[Array, "rows"]) -> Bool[Array, "rows vocab"]:
    """With one token more in each row."""
    return seen.at[jnp.arange(seen.shape[0]), tokens].set(True)


def penalize(
    logits: Float[Array, "rows vocab"], seen: Bool[Array, "rows vocab"], penalty: Float[ArrayLike, ""]
) -> Float[Array, "rows vocab"]:
    """The repetition penalty of CTRL (arXiv:1909.05858, section 4.1), as transformers has it: the logits of seen
    tokens are divided by it where positive, multiplied where negative."""
    return jnp.where(seen, jnp.where(logits < 0, logits * penalty, logits / penalty), logits)


def warp(logits: Float[Array, "rows vocab"], sampler: Sampler) -> Float[Array, "rows vocab"]:
    """Temperature, top-k, top-p and min-p, in transformers' order; -inf for what is filtered out.

    Each filter works on what the ones before it left. Top-k keeps all that are equal to the k-th. Top-p
    keeps the shortest run of the likeliest tokens whose probabilities reach `top_p`, of equal ones the first
    first (in transformers whichever its sort has first). Min-p keeps what has at least `min_p` times the
    probability of the likeliest.
    """
    if sampler.temperature is not None:
        logits = logits / sampler.temperature
    if sampler.top_k is None and sampler.left_out is None and sampler.min_p is None:
        return logits
    vocab = logits.shape[-1]
    count = min(sampler.candidates, vocab)
    if sampler.left_out is None and sampler.min_p is None:
        return jnp.where(logits < _kth(highest(logits, count)[0], sampler), -jnp.inf, logits)
    logits = jnp.where(logits == 0, 0, logits)  # -0 is equal to 0, and sorted behind it
    value, place, found = _last_kept(logits, sampler, count)
    if count < vocab:

        def search_all() -> tuple[Array, Array]:
            # The rows that are done already keep theirs, to the bit: no row depends on the others.
            whole_value, whole_place, _ = _last_kept(logits, sampler, vocab)
            return jnp.where(found, value, whole_value), jnp.where(found, place, whole_place)

        value, place = jax.lax.cond(jnp.all(found), lambda: (value, place), search_all)
    value, place = value[:, None], place[:, None]
    kept = (logits > value) | ((logits == value) & (jnp.arange(vocab) <= place))
    return jnp.where(kept, logits, -jnp.inf)


def highest(
    logits: Float[Array, "rows vocab"], count: int
) -> tuple[Float[Array, "rows count"], Int[Array, "rows count"]]:
    """The highest logits, falling, and their ids, of equal ones the first first."""
    # Without the barrier XLA takes a slice of the result together with top_k's own, and sorts the whole
    # vocabulary instead: a hundred times slower on a CPU.
    values, places = jax.lax.optimization_barrier(jax.lax.top_k(logits, count))
    return values, places


def _kth(values: Float[Array, "rows count"], sampler: Sampler) -> Float[Array, "rows 1"]:
    """Of logits in falling order the last that top-k keeps."""
    assert sampler.top_k is not None
    index = jnp.clip(jnp.maximum(sampler.top_k, sampler.least), 1, values.shape[-1]) - 1
    last: Array = jax.lax.dynamic_index_in_dim(values, index, axis=-1)
    return last


def _last_kept(
    logits: Float[Array, "rows vocab"], sampler: Sampler, count: int
) -> tuple[Float[Array, "rows"], Int[Array, "rows"], Bool[Array, "rows"]]:
    """The last that the filters keep in falling order: its logit, its id, and whether the `count` highest
    logits were enough to find it."""
    values, places = highest(logits, count)
    weights = jnp.exp(values - values[:, :1])
    kept, always = jnp.ones(values.shape, bool), jnp.arange(count) < sampler.least
    if sampler.top_k is not None:
        kept = values >= _kth(values, sampler)
    by_top_k = kept
    if sampler.left_out is not None:
        kept &= (_from_last(logits, values, places, kept, sampler) > sampler.left_out) | always
    if sampler.min_p is not None:
        kept &= (weights >= sampler.min_p) | always
    # Where top-k left more than these, so that top-p has not seen them all, the rest is not known either.
    found = ~kept[:, -1] if sampler.top_k is None else ~by_top_k[:, -1]
    last = jnp.sum(kept, axis=-1, keepdims=True) - 1
    value, place = (jnp.take_along_axis(x, last, axis=-1)[:, 0] for x in (values, places))
    return value, place, found


def _from_last(
    logits: Float[Array, "rows vocab"],
    values: Float[Array, "rows count"],
    places: Int[Array, "rows count"],
    kept: Bool[Array, "rows count"],
    sampler: Sampler,
) -> Float[Array, "rows count"]:
    """Of the highest logits, falling, the probability of each and of all behind it, of what top-k left.

    Summed as `TopPLogitsWarper` does, from the least likely on and as exactly as float32 tells, so that a border
    which the probabilities meet exactly is met.
    """
    weights = jnp.where(kept, jnp.exp(values - values[:, :1]), 0)
    if sampler.top_k is not None:
        total, behind = jnp.sum(weights, axis=-1, keepdims=True), jnp.zeros_like(weights[:, :1])
    else:
        everything = jnp.exp(logits - values[:, :1])
        last, place = values[:, -1:], places[:, -1:]
        is_behind = (logits < last) | ((logits == last) & (jnp.arange(logits.shape[-1]) > place))
        total = jnp.sum(everything, axis=-1, keepdims=True)
        behind = jnp.sum(jnp.where(is_behind, everything / total, 0), axis=-1, keepdims=True)
    rising = jnp.concatenate([behind, weights[:, ::-1] / total], axis=-1)
    sums, errors = jax.lax.associative_scan(_exact_sum, (rising, jnp.zeros_like(rising)), axis=-1)
    rising_sums: Array = sums + errors
    return rising_sums[:, :0:-1]


def _exact_sum(one: tuple[Array, Array], other: tuple[Array, Array]) -> tuple[Array, Array]:
    """The sum of two numbers, each a float32 and what is left over of it (Knuth's two-sum)."""
    total = one[0] + other[0]
    part = total - one[0]
    error = (one[0] - (total - part)) + (other[0] - part) + one[1] + other[1]
    return total, error


def choose(
    logits: Float[Array, "rows vocab"],
    sampler: Sampler,
    keys: PRNGKeyArray | None = None,
    seen: Bool[Array, "rows vocab"] | None = None,
) -> tuple[Int[Array, "rows"], Float[Array, "rows"]]:
    """The next token of each row and its log-probability in the model's own distribution, that is without
    penalty and filters and at temperature 1.

    Args:
        logits: Of the model.
        sampler: The filters.
        keys: One for each row, used up by this token, and what the row's draw depends on beside its logits. None:
            the likeliest token, the first of equal ones.
        seen: The tokens that the repetition penalty is for; needed where the sampler has one.

    Example:
        >>> logits = jnp.log(jnp.array([[0.1, 0.7, 0.2]]))
        >>> token, logprob = choose(logits, Sampler())
        >>> token.tolist(), jnp.exp(logprob).round(2).tolist()
        ([1], [0.699999988079071])
    """
    logits = logits.astype(jnp.float32)
    processed = logits
    if sampler.repetition_penalty is not None:
        assert seen is not None
        processed = penalize(logits, seen, sampler.repetition_penalty)
    tokens = likeliest(processed) if keys is None else draw(warp(processed, sampler), keys)
    chosen = jnp.take_along_axis(logits, tokens[:, None], axis=-1)[:, 0]
    return tokens, chosen - jax.nn.logsumexp(logits, axis=-1)


def draw(logits: Float[Array, "rows vocab"], keys: PRNGKeyArray) -> Int[Array, "rows"]:
    """A token of each row's distribution softmax(logits), from its own key."""
    rows, vocab = logits.shape
    filled = jnp.pad(logits, ((0, 0), (0, -vocab % _BLOCK)), constant_values=-jnp.inf)
    blocks = filled.reshape(rows, -1, _BLOCK)
    keys = jax.vmap(jax.random.split)(keys)
    categorical = jax.vmap(jax.random.categorical)
    block = categorical(keys[:, 0], jax.nn.logsumexp(blocks, axis=-1))
    inside = jnp.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0]
    return block * _BLOCK + categorical(keys[:, 1], inside)
