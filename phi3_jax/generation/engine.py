"""The compiled programs of generation: reading prompts, and decoding a few tokens at a time.

There is one program for each bucket of shapes (`bucket`), whatever the prompts' lengths in it, and
settings that are numbers are arguments of it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from phi3_jax.generation.beam import BeamSearch, BeamState
from phi3_jax.generation.sampling import Sampler, add_seen, choose, seen_tokens, step_keys
from phi3_jax.lora import Lora, LoraRows
from phi3_jax.model.cache import Cache, empty_cache
from phi3_jax.model.cached_forward import cached_forward
from phi3_jax.model.logits import adapted_logits
from phi3_jax.model.phi3 import Phi3ForCausalLM
from phi3_jax.model.products import precise, project
from phi3_jax.model.protocols import Adapters, materialised
from phi3_jax.model.walk import Layer
from phi3_jax.parallel.mesh import ambient_mesh, platform
from phi3_jax.system.memory import free_memory

AnyLora = Lora | LoraRows | None

# The most tokens that one call decodes before the host looks at them.
CHUNK = 32


def bucket(length: int) -> int:
    """The length that programs are compiled for: a power of two, then in steps that waste less and less."""
    if length <= 64:
        return max(16, 1 << (length - 1).bit_length())
    step = 64 if length <= 512 else 256 if length <= 4096 else 1024
    return math.ceil(length / step) * step


class Progress(NamedTuple):
    """Where the answers of a batch are.

    **Fields**: `token`, the last of each, which the model has not read yet; `logprob`, of that; `seen`, the tokens
    that are in prompt or answer, where a penalty asks for it; `done`, which have ended; `number`, of tokens so far.
    """

    token: Int[Array, "answers"]
    logprob: Float[Array, "answers"]
    seen: Bool[Array, "answers vocab"] | None
    done: Bool[Array, "answers"]
    number: Int[Array, ""]


class Rules(NamedTuple):
    """How the next token is chosen. **Fields**: `keys`, one for each answer, None to take the likeliest; `ends`, the
    tokens that end an answer, and `pad`, what comes after it."""

    sampler: Sampler
    keys: PRNGKeyArray | None
    ends: Int[Array, "ends"]
    pad: Int[Array, ""]

    def after(self, logits: Float[Array, "answers vocab"], progress: Progress) -> Progress:
        """With the token that these logits give."""
        keys = None if self.keys is None else step_keys(self.keys, progress.number)
        token, logprob = choose(logits, self.sampler, keys, progress.seen)
        token = jnp.where(progress.done, self.pad, token.astype(jnp.int32))
        return Progress(
            token=token,
            logprob=jnp.where(progress.done, 0, logprob),
            seen=None if progress.seen is None else add_seen(progress.seen, token),
            done=progress.done | jnp.isin(token, self.ends),
            number=progress.number + 1,
        )


@dataclass(frozen=True)
class Engine:
    """A model with an adapter, ready to decode.

    **Fields**: `graph` and `state`, of the model; `lora`; `unstacked`, every layer by itself, its weights and
    adapters in arrays of their own, or None.
    """

    graph: Any
    state: Any
    lora: AnyLora
    unstacked: list[Layer] | None

    @classmethod
    def of(cls, model: Phi3ForCausalLM, lora: AnyLora) -> "Engine":
        graph, state = nnx.split(model)
        layers = nnx.state(model.model.layers)
        # XLA's CPU backend copies a layer's weights out of the stack for every token, three times the work.
        # Once for the whole answer is little, where there is room for it.
        is_alone = platform() == "cpu" and ambient_mesh().size == 1
        is_worth_it = is_alone and 2 * _bytes(layers) < free_memory()
        return cls(graph, state, lora, _unstack(graph, state, lora) if is_worth_it else None)

    def read_prompt(
        self, tokens: Int[np.ndarray, "batch seq"], mask: Int[np.ndarray, "batch seq"], capacity: int
    ) -> tuple[Float[Array, "batch vocab"], Cache]:
        """The logits of what follows, and a cache with room for `capacity` columns."""
        return _read_prompt(self.graph, self.state, self.lora, tokens, mask, capacity)

    def decode(
        self, cache: Cache, progress: Progress, rules: Rules, steps: int
    ) -> tuple[Cache, Progress, Int[Array, "answers chunk"], Float[Array, "answers chunk"]]:
        """Up to `steps` (at most `CHUNK`) further tokens of each answer, with their log-probabilities; fewer where
        all have ended. The cache given is used up."""
        return _decode(self.graph, self.state, self.lora, self.unstacked, cache, progress, rules, steps)

    def search(
        self, cache: Cache, search: BeamSearch, beams: BeamState, token: Array, keys: PRNGKeyArray | None, steps: int
    ) -> tuple[Cache, BeamState, Int[Array, "rows"]]:
        """Up to `steps` further tokens of each beam, and the last of them. The cache given is used up."""
        arguments = self.graph, self.state, self.lora, self.unstacked, cache, search, beams, token, keys, steps
        return _search(*arguments)

    def rows(self, rows: Int[np.ndarray, "answers"]) -> "Engine":
        """The engine of a batch made of these rows."""
        if not isinstance(self.lora, LoraRows):
            return self
        lora = replace(self.lora, rows=self.lora.rows[rows])
        # In `unstacked` the adapters know their rows, too.
        unstacked = None if self.unstacked is None else _unstack(self.graph, self.state, lora)
        return Engine(self.graph, self.state, lora, unstacked)

    def read_again(self, tokens: Sequence[int], cache: Cache, row: int) -> Cache:
        """The cache, in which this row has been read anew from its first token on; `tokens` has the one that is
        read next as the last."""
        longest = bucket(len(tokens))
        ids, mask = np.zeros((1, longest), np.int32), np.zeros((1, longest), np.int32)
        ids[0, longest - len(tokens) :], mask[0, longest - len(tokens) :] = tokens, 1
        lora = self.lora
        if isinstance(lora, LoraRows):
            lora = replace(lora, rows=lora.rows[row : row + 1])
        return _read_again(self.graph, self.state, lora, ids, mask, cache, row)


@partial(jax.jit, static_argnums=0)
def _unstack(graph: Any, state: Any, lora: AnyLora) -> list[Layer]:
    model: Phi3ForCausalLM = nnx.merge(graph, state).with_saved(lora)
    return list(model.model.stack(materialised(lora, "model")))


@jax.jit
def take_rows(cache: Cache, logits: Array, rows: Int[Array, "answers"]) -> tuple[Cache, Array]:
    """The batch made of these rows; compiled, since several hosts can do no more with arrays that they share."""
    return cache.rows(rows), logits[rows]


@partial(jax.jit, static_argnums=(0, 5))
def _read_prompt(
    graph: Any, state: Any, lora: AnyLora, tokens: Array, mask: Array, capacity: int
) -> tuple[Array, Cache]:
    model: Phi3ForCausalLM = nnx.merge(graph, state)
    cache = empty_cache(model.config, len(tokens), capacity, model.dtype)
    last = jnp.asarray([tokens.shape[1] - 1])
    logits, cache = model(tokens, attention_mask=mask, lora=lora, cache=cache, logits_to_keep=last)
    return logits[:, 0], cache


@partial(jax.jit, static_argnums=0, donate_argnums=5)
def _read_again(graph: Any, state: Any, lora: AnyLora, tokens: Array, mask: Array, cache: Cache, row: Array) -> Cache:
    model: Phi3ForCausalLM = nnx.merge(graph, state)
    # So that the last of these tokens comes into the column that is read next.
    first = cache.length + 1 - tokens.shape[1]
    own = replace(empty_cache(model.config, 1, cache.capacity, model.dtype), length=first)
    # The last token's logits are the next step's work; of the head nothing is left but one row.
    _, own = model(tokens, attention_mask=mask, lora=lora, cache=own, logits_to_keep=jnp.asarray([0]))
    own = own.unstacked() if isinstance(cache.k, tuple) else own
    axis = 0 if isinstance(cache.k, tuple) else 1
    k, v = jax.tree.map(
        lambda all_rows, one: jax.lax.dynamic_update_slice_in_dim(all_rows, one, row, axis),
        (cache.k, cache.v),
        (own.k, own.v),
    )
    return replace(cache, k=k, v=v)


@jax.jit
def first_token(logits: Array, prompts: Int[Array, "answers seq"], rules: Rules) -> Progress:
    """The first token of each answer, after its prompt (-1 at padding) of these logits."""
    rows, vocab = logits.shape
    seen = None if rules.sampler.repetition_penalty is None else seen_tokens(prompts, prompts >= 0, vocab)
    nothing = jnp.zeros(rows, jnp.int32)
    start = Progress(nothing, jnp.zeros(rows), seen, jnp.zeros(rows, bool), jnp.zeros((), jnp.int32))
    return rules.after(logits, start)


@partial(jax.jit, static_argnums=0, donate_argnums=4)
def _decode(
    graph: Any, state: Any, lora: AnyLora, unstacked: Any, cache: Cache, progress: Progress, rules: Rules, steps: Array
) -> tuple[Cache, Progress, Array, Array]:
    model, adapters, head = prepared(graph, state, lora)
    end = progress.number + steps
    start = progress.number

    def unfinished(carry: Any) -> Array:
        _, progress, _, _ = carry
        return (progress.number < end) & ~jnp.all(progress.done)

    def step(carry: Any) -> Any:
        cache, progress, tokens, logprobs = carry
        logits, cache = next_logits(model, adapters, head, unstacked, progress.token, cache)
        column = progress.number - start
        progress = rules.after(logits, progress)
        tokens = jax.lax.dynamic_update_index_in_dim(tokens, progress.token, column, 1)
        logprobs = jax.lax.dynamic_update_index_in_dim(logprobs, progress.logprob, column, 1)
        return cache, progress, tokens, logprobs

    rows = progress.token.shape[0]
    tokens = jnp.full((rows, CHUNK), rules.pad, jnp.int32)
    return jax.lax.while_loop(unfinished, step, (cache, progress, tokens, jnp.zeros((rows, CHUNK))))


@jax.jit
def first_beams(
    search: BeamSearch, logits: Array, prompts: Int[Array, "rows seq"], keys: PRNGKeyArray | None
) -> tuple[BeamState, Int[Array, "rows"]]:
    """The search after its first token, and that token of each beam."""
    rows, vocab = logits.shape
    one_of_each = prompts[:: search.beams]
    is_penal = search.sampler.repetition_penalty is not None
    seen = seen_tokens(one_of_each, one_of_each >= 0, vocab) if is_penal else None
    state = search.start(rows // search.beams, seen)
    # All beams of a prompt have the same cache still, whichever they go on from.
    state, _, token = search.step(state, logits, None if keys is None else step_keys(keys, 0))
    return state, token


@partial(jax.jit, static_argnums=0, donate_argnums=4)
def _search(
    graph: Any,
    state: Any,
    lora: AnyLora,
    unstacked: Any,
    cache: Cache,
    search: BeamSearch,
    beams: BeamState,
    token: Array,
    keys: PRNGKeyArray | None,
    steps: Array,
) -> tuple[Cache, BeamState, Array]:
    model, adapters, head = prepared(graph, state, lora)
    end = jnp.minimum(beams.step + steps, search.divisors.shape[0])

    def unfinished(carry: tuple[Cache, BeamState, Array]) -> Array:
        return (carry[1].step < end) & search.unfinished(carry[1])

    def step(carry: tuple[Cache, BeamState, Array]) -> tuple[Cache, BeamState, Array]:
        cache, beams, token = carry
        logits, cache = next_logits(model, adapters, head, unstacked, token, cache)
        beams, parents, token = search.step(beams, logits, None if keys is None else step_keys(keys, beams.step))
        return cache.rows(parents), beams, token

    return jax.lax.while_loop(unfinished, step, (cache, beams, token))


def next_logits(
    model: Phi3ForCausalLM,
    adapters: Adapters,
    head: tuple[Array, Adapters],
    unstacked: Sequence[Layer] | None,
    token: Int[Array, "answers"],
    cache: Cache,
) -> tuple[Float[Array, "answers vocab"], Cache]:
    """The logits after one more token of each row; everything that does not change with it made before."""
    weight, head_adapters = head
    with precise(model.dtype):
        x = model.model.embed_tokens(token[:, None], adapters.get("embed_tokens"))
        x, cache = cached_forward(model.model, x, None, adapters, cache, model.attention, unstacked)
        logits = adapted_logits(project(x, weight, jnp.float32), x, weight, head_adapters, None)
    return logits[:, 0], cache


def prepared(graph: Any, state: Any, lora: AnyLora) -> tuple[Phi3ForCausalLM, Adapters, tuple[Array, Adapters]]:
    """The model, the adapters of its body, and its head."""
    model: Phi3ForCausalLM = nnx.merge(graph, state).with_saved(lora)
    return model, materialised(lora, "model"), model.head(lora)


def _bytes(tree: Any) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))
