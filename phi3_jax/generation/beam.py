"""Beam search, as transformers has it, a state machine on device arrays."""

from dataclasses import dataclass, field, replace

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from phi3_jax.config.generation import GenerationConfig
from phi3_jax.generation.sampling import Sampler, add_seen, highest, penalize, warp

# Added to the score of what must not be taken. As in transformers, not -inf: two of them can be told apart.
_BARRED = -1e9


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Hypotheses:
    """Beginnings of answers, or answers, the best first.

    Attributes:
        tokens: Of each.
        logprobs: Each token's in the model's own distribution, 0 beyond `lengths`.
        lengths: Of each, in tokens.
        scores: The sum of what the search goes by, for finished ones divided by length ** length_penalty.
    """

    tokens: Int[Array, "batch beams new"]
    logprobs: Float[Array, "batch beams new"]
    lengths: Int[Array, "batch beams"]
    scores: Float[Array, "batch beams"]

    def take(self, index: Int[Array, "batch taken"]) -> "Hypotheses":
        """Those at `index`, for each row its own."""
        taken: Hypotheses = jax.tree.map(lambda x: jax.vmap(lambda row, places: row[places])(x, index), self)
        return taken


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class BeamState:
    """What a step changes.

    Attributes:
        running: The beginnings that go on.
        finished: The best answers so far.
        is_finished: Whether a place in `finished` has an answer.
        can_improve: Whether a row's running beams may still come to a better answer.
        goes_on: Whether anything is left to go on with; not after the last step.
        seen: The tokens in the prompt and each running beam, where there is a repetition penalty.
        step: New tokens in each running beam.
    """

    running: Hypotheses
    finished: Hypotheses
    is_finished: Bool[Array, "batch beams"]
    can_improve: Bool[Array, "batch"]
    goes_on: Bool[Array, ""]
    seen: Bool[Array, "rows vocab"] | None
    step: Int[Array, ""]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class BeamSearch:
    """The search: `start`, then `step` while `unfinished`, then `finish`. All can be traced.

    Rows of the model's batch are `batch * beams`, the beams of a prompt side by side.

    ```
    search = BeamSearch.from_settings(settings, new_tokens)
    state = search.start(batch)
    while search.unfinished(state):
        state, parents, tokens = search.step(state, logits)  # [batch * beams, vocab]
        # the cache's rows are taken at `parents`, and the model goes on with `tokens`
    answers = search.finish(state, num_return_sequences)
    ```

    Attributes:
        divisors: 1 to the most new tokens, each ** length_penalty.
        ends: The tokens that end an answer.
        pad: What stands after it.
        sampler: The filters.
        beams: Of each prompt.
        stops_when_full: `early_stopping` is True: a row is done with as many answers as beams. Otherwise it is once
            its best running beam is worse than all of them, if it ended here.
        looks_ahead: Or if it ended at the greatest length, which is what "never" takes where the length penalty
            favours long answers.
    """

    divisors: Float[Array, "new"]
    ends: Int[Array, "ends"]
    pad: Int[Array, ""]
    sampler: Sampler
    beams: int = field(metadata={"static": True})
    stops_when_full: bool = field(metadata={"static": True})
    looks_ahead: bool = field(metadata={"static": True})

    @classmethod
    def from_settings(cls, settings: GenerationConfig, new_tokens: int) -> "BeamSearch":
        """The search that `settings` ask for, of answers of up to so many tokens."""
        lengths = np.arange(1, new_tokens + 1, dtype=np.float64)
        return cls(
            divisors=jnp.asarray(lengths**settings.length_penalty, jnp.float32),
            ends=jnp.asarray(settings.eos_token_id, jnp.int32),
            pad=jnp.asarray(settings.pad_id, jnp.int32),
            sampler=Sampler.from_settings(settings),
            beams=settings.num_beams,
            stops_when_full=settings.early_stopping is True,
            looks_ahead=settings.early_stopping == "never" and settings.length_penalty > 0,
        )

    @property
    def candidates(self) -> int:
        """How many continuations of a prompt's beams are looked at: enough for as many beams as before if
        the others all end."""
        return max(2, 1 + self.ends.shape[0]) * self.beams

    def start(self, batch: int, seen: Bool[Array, "batch vocab"] | None = None) -> BeamState:
        """The state before the first token; `seen`: the prompts' tokens, where the sampler has a penalty."""
        shape = batch, self.beams
        new = self.divisors.shape[0]
        none = Hypotheses(
            tokens=jnp.full((*shape, new), self.pad, jnp.int32),
            logprobs=jnp.zeros((*shape, new), jnp.float32),
            lengths=jnp.zeros(shape, jnp.int32),
            scores=jnp.full(shape, _BARRED, jnp.float32),
        )
        # All beams of a prompt are the same, so that the first step goes on from one alone.
        first = replace(none, scores=none.scores.at[:, 0].set(0))
        return BeamState(
            running=first,
            finished=none,
            is_finished=jnp.zeros(shape, bool),
            can_improve=jnp.ones(batch, bool),
            goes_on=jnp.asarray(True),
            seen=None if seen is None else jnp.repeat(seen, self.beams, axis=0),
            step=jnp.zeros((), jnp.int32),
        )

    def unfinished(self, state: BeamState) -> Bool[Array, ""]:
        """Whether another step can change an answer."""
        return state.goes_on & jnp.any(self._open(state))

    def _open(self, state: BeamState) -> Bool[Array, "batch"]:
        """The rows whose answers can still change."""
        if not self.stops_when_full:
            return state.can_improve
        return state.can_improve & ~jnp.all(state.is_finished, axis=-1)

    def step(
        self, state: BeamState, logits: Float[Array, "rows vocab"], keys: PRNGKeyArray | None = None
    ) -> tuple[BeamState, Int[Array, "rows"], Int[Array, "rows"]]:
        """One token more: the new state, the row that each beam goes on from, and its new token.

        Args:
            state: The beams.
            logits: After the running ones.
            keys: One for each prompt, to sample: the continuations are then drawn without replacement, by the beams'
                scores.
        """
        continued, parents, ends = self._continued(state, logits, keys)
        finished, is_finished = self._finished(state, continued, ends)
        barred = jnp.where(ends, continued.scores + _BARRED, continued.scores)
        scores, best = jax.lax.top_k(barred, self.beams)
        running = replace(continued.take(best), scores=scores)
        rows = jnp.arange(best.shape[0])[:, None] * self.beams + jnp.take_along_axis(parents, best, axis=1)
        rows, tokens = rows.reshape(-1), running.tokens[:, :, state.step].reshape(-1)
        possible = scores[:, :1] / self.divisors[-1 if self.looks_ahead else state.step]
        worst = jnp.where(is_finished, jnp.min(finished.scores, axis=1, keepdims=True), _BARRED)
        new = BeamState(
            running=running,
            finished=finished,
            is_finished=is_finished,
            can_improve=state.can_improve & jnp.any(possible > worst, axis=1),
            goes_on=~jnp.all(ends),
            seen=None if state.seen is None else add_seen(state.seen[rows], tokens),
            step=state.step + 1,
        )
        return new, rows, tokens

    def _continued(
        self, state: BeamState, logits: Float[Array, "rows vocab"], keys: PRNGKeyArray | None
    ) -> tuple[Hypotheses, Int[Array, "batch candidates"], Bool[Array, "batch candidates"]]:
        """The candidates with their sums, the beams that they go on from, and which of them end here."""
        batch, vocab = state.can_improve.shape[0], logits.shape[-1]
        logprobs = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
        processed = logprobs
        if self.sampler.repetition_penalty is not None:
            assert state.seen is not None
            processed = penalize(logprobs, state.seen, self.sampler.repetition_penalty)
        if keys is not None:
            processed = warp(processed, self.sampler)
        sums = (state.running.scores.reshape(-1, 1) + processed).reshape(batch, -1)
        noisy = sums
        if keys is not None:
            # The highest with Gumbel noise are a draw without replacement (arXiv:1903.06059, section 2.3).
            noisy = sums + jax.vmap(lambda key: jax.random.gumbel(key, sums.shape[1:]))(keys)
        _, index = highest(noisy, self.candidates)
        parents, tokens = index // vocab, index % vocab
        continued = state.running.take(parents)
        last = state.step + 1 == self.divisors.shape[0]
        logprobs = jnp.take_along_axis(logprobs.reshape(batch, -1), index, axis=1)
        continued = Hypotheses(
            tokens=continued.tokens.at[:, :, state.step].set(tokens),
            logprobs=continued.logprobs.at[:, :, state.step].set(logprobs),
            lengths=continued.lengths + 1,
            scores=jnp.take_along_axis(sums, index, axis=1),
        )
        return continued, parents, jnp.isin(tokens, self.ends) | last

    def _finished(
        self, state: BeamState, continued: Hypotheses, ends: Bool[Array, "batch candidates"]
    ) -> tuple[Hypotheses, Bool[Array, "batch beams"]]:
        """The best answers of those there were and the candidates that end here, and which places have one."""
        # The candidates beyond the first ones are there to go on with alone.
        ends &= jnp.arange(self.candidates) < self.beams
        scores = continued.scores / self.divisors[state.step]
        scores += jnp.where(self._open(state), 0, _BARRED)[:, None]
        scores += jnp.where(ends, 0, _BARRED)
        merged = _side_by_side(state.finished, replace(continued, scores=scores))
        _, best = jax.lax.top_k(merged.scores, self.beams)
        is_finished = jnp.take_along_axis(jnp.concatenate([state.is_finished, ends], axis=1), best, axis=1)
        return merged.take(best), is_finished

    def finish(self, state: BeamState, num_return_sequences: int = 1) -> Hypotheses:
        """The best answers to each prompt, `pad` after their ends.

        Where the search was left early, running beams count as answers too. Where there are fewer answers
        than asked for, which takes filters that leave hardly a token, the best is repeated.
        """
        divisor = self.divisors[jnp.maximum(state.step, 1) - 1]
        barred = jnp.where(self._open(state) & state.goes_on, 0, _BARRED)[:, None]
        running = replace(state.running, scores=state.running.scores / divisor + barred)
        merged = _side_by_side(state.finished, running)
        scores, best = jax.lax.top_k(merged.scores, num_return_sequences)
        best = jnp.where(scores > _BARRED / 2, best, best[:, :1])
        return merged.take(best)


def _side_by_side(first: Hypotheses, second: Hypotheses) -> Hypotheses:
    both: Hypotheses = jax.tree.map(lambda *pair: jnp.concatenate(pair, axis=1), first, second)
    return both
