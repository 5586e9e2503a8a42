"""The compiled programs of generation: reading prompts, and decoding a few tokens at a time.

There is one program for each bucket of shapes (`system.buckets`), whatever the prompts' lengths in it, and
settings that are numbers are arguments of it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, ArrayLike, Bool, Float, Int, PRNGKeyArray, PyTree

from phi3_jax.generation.beam import BeamSearch, BeamState
from phi3_jax.generation.sampling import Sampler, add_seen, choose, seen_tokens, step_keys
from phi3_jax.lora import Lora, LoraRows
from phi3_jax.model.cache import Cache, empty_cache
from phi3_jax.model.cached_forward import cached_forward
from phi3_jax.model.logits import adapted_logits
from phi3_jax.model.phi3 import Phi3ForCausalLM
from phi3_jax.model.products import precise, project
from phi3_jax.model.protocols import materialised
from phi3_jax.model.walk import Layer
from phi3_jax.parallel.mesh import ambient_mesh, platform
from phi3_jax.system.buckets import bucket
from phi3_jax.system.memory import free_memory

# The most tokens that one call decodes before the host looks at them.
CHUNK = 32


class Progress(NamedTuple):
    """Where the answers of a batch are.

    Attributes:
        token: The last of each, which the model has not read yet.
        logprob: Of that.
        seen: The tokens that are in prompt or answer, where a penalty asks for it.
        done: Which have ended.
        number: Of tokens so far.
    """

    token: Int[Array, "answers"]
    logprob: Float[Array, "answers"]
    seen: Bool[Array, "answers vocab"] | None
    done: Bool[Array, "answers"]
    number: Int[Array, ""]


class Rules(NamedTuple):
    """How the next token is chosen.

    Attributes:
        sampler: The filters.
        keys: One for each answer, None to take the likeliest.
        ends: The tokens that end an answer.
        pad: What comes after it.
    """

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


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Engine:
    """A model with an adapter, ready to decode.

    Attributes:
        graph: Of the model.
        state: Its arrays.
        lora: The adapter, None for the base alone.
        unstacked: Every layer by itself, its weights and adapters in arrays of their own, or None.
    """

    graph: nnx.GraphDef[Phi3ForCausalLM] = field(metadata={"static": True})
    state: PyTree[Array]
    lora: Lora | LoraRows | None
    unstacked: list[Layer] | None = None

    @classmethod
    def of(cls, model: Phi3ForCausalLM, lora: Lora | LoraRows | None) -> "Engine":
        engine = cls(*nnx.split(model), lora)
        # XLA's CPU backend copies a layer's weights out of the stack for every token, three times the work.
        # Once for the whole answer is little, where there is room for it.
        is_alone = platform() == "cpu" and ambient_mesh().size == 1
        nbytes = sum(leaf.nbytes for leaf in jax.tree.leaves(nnx.state(model.model.layers)))
        return replace(engine, unstacked=engine.unstack()) if is_alone and 2 * nbytes < free_memory() else engine

    def rows(self, rows: Int[np.ndarray, "answers"]) -> "Engine":
        """The engine of a batch made of these rows."""
        if not isinstance(self.lora, LoraRows):
            return self
        engine = replace(self, lora=replace(self.lora, rows=self.lora.rows[rows]))
        # In `unstacked` the adapters know their rows, too.
        return engine if self.unstacked is None else replace(engine, unstacked=engine.unstack())

    def read_again(self, tokens: Sequence[int], cache: Cache, row: int) -> Cache:
        """The cache, in which this row has been read anew from its first token on; `tokens` has the one that is
        read next as the last."""
        longest = bucket(len(tokens))
        ids, mask = np.zeros((1, longest), np.int32), np.zeros((1, longest), np.int32)
        ids[0, longest - len(tokens) :], mask[0, longest - len(tokens) :] = tokens, 1
        lora = self.lora
        if isinstance(lora, LoraRows):
            lora = replace(lora, rows=lora.rows[row : row + 1])
        read: Cache = replace(self, lora=lora)._read_again(ids, mask, cache, row)
        return read

    @jax.jit
    def unstack(self) -> list[Layer]:
        """What `unstacked` is."""
        return list(self._model().model.stack(materialised(self.lora, "model")))

    @partial(jax.jit, static_argnames="capacity")
    def read_prompt(
        self, tokens: Int[ArrayLike, "batch seq"], mask: Int[ArrayLike, "batch seq"], capacity: int
    ) -> tuple[Float[Array, "batch vocab"], Cache]:
        """The logits of what follows, and a cache with room for `capacity` columns."""
        model: Phi3ForCausalLM = nnx.merge(self.graph, self.state)
        batch, seq = jnp.shape(tokens)
        cache = empty_cache(model.config, batch, capacity, model.dtype)
        last = jnp.asarray([seq - 1])
        logits, cache = model(tokens, attention_mask=mask, lora=self.lora, cache=cache, logits_to_keep=last)
        return logits[:, 0], cache

    @partial(jax.jit, donate_argnames="cache")
    def _read_again(
        self, tokens: Int[ArrayLike, "1 seq"], mask: Int[ArrayLike, "1 seq"], cache: Cache, row: Int[ArrayLike, ""]
    ) -> Cache:
        model: Phi3ForCausalLM = nnx.merge(self.graph, self.state)
        # So that the last of these tokens comes into the column that is read next.
        first = cache.length + 1 - jnp.shape(tokens)[1]
        own = replace(empty_cache(model.config, 1, cache.capacity, model.dtype), length=first)
        # The last token's logits are the next step's work; of the head nothing is left but one row.
        _, own = model(tokens, attention_mask=mask, lora=self.lora, cache=own, logits_to_keep=jnp.asarray([0]))
        own = own.unstacked() if isinstance(cache.k, tuple) else own
        axis = 0 if isinstance(cache.k, tuple) else 1
        k, v = jax.tree.map(
            lambda all_rows, one: jax.lax.dynamic_update_slice_in_dim(all_rows, one, row, axis),
            (cache.k, cache.v),
            (own.k, own.v),
        )
        return replace(cache, k=k, v=v)

    @partial(jax.jit, donate_argnames="cache")
    def decode(
        self, cache: Cache, progress: Progress, rules: Rules, steps: Int[ArrayLike, ""]
    ) -> tuple[Cache, Progress, Int[Array, "answers chunk"], Float[Array, "answers chunk"]]:
        """Up to `steps` (at most `CHUNK`) further tokens of each answer, with their log-probabilities; fewer where
        all have ended. The cache given is used up."""
        next_logits = self._reader()
        start, end = progress.number, progress.number + steps
        State = tuple[Cache, Progress, Array, Array]

        def unfinished(carry: State) -> Bool[Array, ""]:
            progress = carry[1]
            return (progress.number < end) & ~jnp.all(progress.done)

        def step(carry: State) -> State:
            cache, progress, tokens, logprobs = carry
            logits, cache = next_logits(progress.token, cache)
            column = progress.number - start
            progress = rules.after(logits, progress)
            tokens = jax.lax.dynamic_update_index_in_dim(tokens, progress.token, column, 1)
            logprobs = jax.lax.dynamic_update_index_in_dim(logprobs, progress.logprob, column, 1)
            return cache, progress, tokens, logprobs

        rows = progress.token.shape[0]
        tokens = jnp.full((rows, CHUNK), rules.pad, jnp.int32)
        return jax.lax.while_loop(unfinished, step, (cache, progress, tokens, jnp.zeros((rows, CHUNK))))

    @partial(jax.jit, donate_argnames="cache")
    def search(
        self,
        cache: Cache,
        search: BeamSearch,
        beams: BeamState,
        token: Int[Array, "rows"],
        keys: PRNGKeyArray | None,
        steps: Int[ArrayLike, ""],
    ) -> tuple[Cache, BeamState, Int[Array, "rows"]]:
        """Up to `steps` further tokens of each beam, and the last of them. The cache given is used up."""
        next_logits = self._reader()
        end = jnp.minimum(beams.step + steps, search.divisors.shape[0])
        State = tuple[Cache, BeamState, Array]

        def unfinished(carry: State) -> Bool[Array, ""]:
            return (carry[1].step < end) & search.unfinished(carry[1])

        def step(carry: State) -> State:
            cache, beams, token = carry
            logits, cache = next_logits(token, cache)
            beams, parents, token = search.step(beams, logits, None if keys is None else step_keys(keys, beams.step))
            return cache.rows(parents), beams, token

        return jax.lax.while_loop(unfinished, step, (cache, beams, token))

    def _model(self) -> Phi3ForCausalLM:
        """With the weights that the adapter replaces."""
        model: Phi3ForCausalLM = nnx.merge(self.graph, self.state)
        return model.with_saved(self.lora)

    def _reader(self) -> Callable[[Int[Array, "answers"], Cache], tuple[Float[Array, "answers vocab"], Cache]]:
        """Gives the logits after one more token of each row; what does not change with it is made here, once."""
        model, adapters = self._model(), materialised(self.lora, "model")
        weight, head_adapters = model.head(self.lora)

        def next_logits(token: Int[Array, "answers"], cache: Cache) -> tuple[Float[Array, "answers vocab"], Cache]:
            with precise(model.dtype):
                x = model.model.embed_tokens(token[:, None], adapters.get("embed_tokens"))
                x, cache = cached_forward(model.model, x, None, adapters, cache, model.attention, self.unstacked)
                logits = adapted_logits(project(x, weight, jnp.float32), x, weight, head_adapters, None)
            return logits[:, 0], cache

        return next_logits


@jax.jit
def take_rows(cache: Cache, logits: Array, rows: Int[Array, "answers"]) -> tuple[Cache, Array]:
    """The batch made of these rows; compiled, since several hosts can do no more with arrays that they share."""
    return cache.rows(rows), logits[rows]


@jax.jit
def first_token(logits: Array, prompts: Int[Array, "answers seq"], rules: Rules) -> Progress:
    """The first token of each answer, after its prompt (-1 at padding) of these logits."""
    rows, vocab = logits.shape
    seen = None if rules.sampler.repetition_penalty is None else seen_tokens(prompts, prompts >= 0, vocab)
    nothing = jnp.zeros(rows, jnp.int32)
    start = Progress(nothing, jnp.zeros(rows), seen, jnp.zeros(rows, bool), jnp.zeros((), jnp.int32))
    return rules.after(logits, start)


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
