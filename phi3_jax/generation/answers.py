"""Answers while they come: what the host does between two calls of the device."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from phi3_jax.config.generation import GenerationConfig
from phi3_jax.data.tokenizer import Tokenizer
from phi3_jax.generation.beam import BeamSearch
from phi3_jax.generation.engine import CHUNK, Engine, Rules, first_beams, first_token, take_rows
from phi3_jax.generation.sampling import Sampler, row_keys
from phi3_jax.generation.stop import StopStrings
from phi3_jax.lora import Lora, LoraRows
from phi3_jax.model.cache import Cache, cache_bytes
from phi3_jax.model.phi3 import Phi3ForCausalLM
from phi3_jax.parallel.distributed import exchange, to_host
from phi3_jax.parallel.mesh import devices_memory
from phi3_jax.system.buckets import bucket
from phi3_jax.system.errors import InputError

# Gets the new tokens of a few steps, with padding after a row's end. Gives for each row how many of them to
# keep where the row shall end among them, and -1 where it goes on; None: all go on.
Watch = Callable[[Int[np.ndarray, "answers chunk"]], Int[np.ndarray, "answers"] | None]

# How many tokens are decoded before the host looks at them where somebody waits to see them, or the time is limited.
WATCHED_CHUNK = 4


@dataclass(frozen=True)
class Generated:
    """What `generate` gives with `return_dict_in_generate`.

    Attributes:
        sequences: The prompts as given, each as often as it has answers, followed by the new tokens; padding after an
            answer's end.
        lengths: New tokens of each answer, its end token counted.
        logprobs: Log-probability of each new token in the model's own distribution, that is without penalty and
            filters and at temperature 1; 0 after the end.
        finish_reasons: `stop` (an end token or a stop string), `length` or `time`.
        scores: Of a beam search: the sum of the log-probabilities over length ** length_penalty.
    """

    sequences: Int[np.ndarray, "answers total"]
    lengths: Int[np.ndarray, "answers"]
    logprobs: Float[np.ndarray, "answers new"]
    finish_reasons: tuple[str, ...]
    scores: Float[np.ndarray, "answers"] | None = None


class Call:
    """One call of `generate`: the prompts, their cache, and what all ways to decode have in common.

    Args:
        model: The model.
        lora: The adapter.
        settings: How to answer.
        tokens: The prompts, padded on the left.
        mask: 0 at the padding.
        copies: How many rows of the batch go on from each prompt.
    """

    def __init__(
        self,
        model: Phi3ForCausalLM,
        lora: Lora | LoraRows | None,
        settings: GenerationConfig,
        tokens: Int[np.ndarray, "batch prompt"],
        mask: Int[np.ndarray, "batch prompt"],
        copies: int,
    ):
        self.start_time = time.monotonic()
        self.settings = settings
        # As in transformers, padding counts as part of the prompt.
        self.most = settings.new_tokens(tokens.shape[1], model.config.max_position_embeddings)
        self.prompts, self.mask = tokens, mask
        # Columns of nothing but padding are left out, and others put in front up to a bucket; the cache has room
        # for these and the answer.
        self.used = int(mask.sum(axis=1).max())
        self.columns = bucket(self.used)
        self.capacity = bucket(self.columns + self.most)
        _check_room(model, len(tokens) * copies, self.capacity)
        self.rows = np.repeat(np.arange(len(tokens)), copies)
        self.prompt_lengths = mask.sum(axis=1)[self.rows]
        self.engine = Engine.of(model, lora)
        rope = model.config.rope
        # Where LongRoPE's factors change, and what a row has read before has to be read again.
        self.crossing = rope.original_max_position_embeddings if rope.is_longrope else None

    def read_prompts(self) -> tuple[Float[Array, "rows vocab"], Cache, Int[np.ndarray, "rows seq"]]:
        """The logits of each row's first token, the cache, and the prompts as read, -1 at padding."""
        front = (0, 0), (self.columns - self.used, 0)
        tokens, mask = (np.pad(x[:, -self.used :], front) for x in (self.prompts, self.mask))
        logits, cache = self.engine.read_prompt(tokens, mask, self.capacity)
        read = np.where(mask == 1, tokens, -1)
        if len(self.rows) > len(tokens):
            cache, logits = take_rows(cache, logits, self.rows)
            read = read[self.rows]
            self.engine = self.engine.rows(self.rows)
        return logits, cache.unstacked() if self.engine.unstacked is not None else cache, read

    def until_crossing(
        self,
        cache: Cache,
        number: int,
        is_open: Bool[np.ndarray, "rows"],
        new: Callable[[int], Int[np.ndarray, "new"]],
    ) -> tuple[Cache, int]:
        """The cache with the rows read again that come to the change of LongRoPE's factors, and how many tokens
        can follow before another row does.

        Args:
            cache: The cache.
            number: Of new tokens in each row, the last of which is to be read next.
            is_open: Which rows go on.
            new: The new tokens of a row.
        """
        if self.crossing is None:
            return cache, CHUNK
        held = self.prompt_lengths + number - 1
        for row in np.flatnonzero((held == self.crossing) & is_open).tolist():
            prompt = self.rows[row]
            tokens = [*self.prompts[prompt][self.mask[prompt] == 1].tolist(), *new(row).tolist()]
            cache = self.engine.read_again(tokens, cache, row)
        ahead = self.crossing - held[(held < self.crossing) & is_open]
        return cache, int(ahead.min(initial=CHUNK))

    def time_is_up(self) -> bool:
        """Whether `max_time` is over, on the first host where there are several."""
        if self.settings.max_time is None:
            return False
        is_up = time.monotonic() - self.start_time >= self.settings.max_time
        return exchange(str(is_up))[0] == "True" if jax.process_count() > 1 else is_up

    def result(
        self,
        new: Int[np.ndarray, "answers new"],
        lengths: Int[np.ndarray, "answers"],
        logprobs: Float[np.ndarray, "answers new"],
        reasons: list[str],
        scores: Float[np.ndarray, "answers"] | None = None,
    ) -> Generated:
        """The new tokens after their prompts, which may have fewer answers than rows."""
        prompts = np.repeat(self.prompts, len(new) // len(self.prompts), axis=0)
        sequences = np.concatenate([prompts, new], axis=1)
        return Generated(sequences, lengths, logprobs, tuple(reasons), scores)


def _check_room(model: Phi3ForCausalLM, rows: int, columns: int) -> None:
    """Raises `InputError` where the keys and values alone are more than the devices hold."""
    needed, there = cache_bytes(model.config, rows, columns, model.dtype), devices_memory()
    if needed > there:
        raise InputError(
            f"{rows:,} answers of up to {columns:,} tokens with their prompts need {needed / 2**30:,.1f} GiB for keys "
            f"and values, and there are {there / 2**30:,.1f} GiB; lower max_new_tokens, num_beams, "
            "num_return_sequences or the number of prompts at once"
        )


class Answers(Call):
    """Answers to each prompt that go on by themselves, each with the likeliest token or one that is drawn."""

    def __init__(
        self,
        model: Phi3ForCausalLM,
        lora: Lora | LoraRows | None,
        settings: GenerationConfig,
        tokens: Int[np.ndarray, "batch prompt"],
        mask: Int[np.ndarray, "batch prompt"],
        tokenizer: Tokenizer | None,
        streamer: Watch | None,
    ):
        super().__init__(model, lora, settings, tokens, mask, settings.num_return_sequences)
        self.watches: list[Watch] = [] if streamer is None else [streamer]
        if settings.stop_strings and tokenizer is not None:
            prompts = [tokens[row][mask[row] == 1].tolist() for row in self.rows]
            self.watches.insert(0, StopStrings(tokenizer, settings.stop_strings, prompts))
        self.new: list[Int[np.ndarray, "answers chunk"]] = []
        self.logprobs: list[Float[np.ndarray, "answers chunk"]] = []
        self.lengths = np.zeros(len(self.rows), np.int64)
        self.reasons = np.full(len(self.rows), "length", object)
        self.done = np.zeros(len(self.rows), bool)

    def run(self) -> Generated:
        settings = self.settings
        logits, cache, read = self.read_prompts()
        rules = Rules(
            Sampler.from_settings(settings),
            row_keys(settings.seed, len(self.prompts), settings.num_return_sequences) if settings.do_sample else None,
            jnp.asarray(settings.eos_token_id, jnp.int32),
            jnp.asarray(settings.pad_id, jnp.int32),
        )
        progress = first_token(logits, read, rules)
        number = self.take(progress.token[:, None], progress.logprob[:, None], 1)
        chunk = WATCHED_CHUNK if self.watches or settings.max_time is not None else CHUNK
        while number < self.most and not self.done.all():
            if self.time_is_up():
                self.reasons[~self.done] = "time"
                break
            cache, most = self.until_crossing(cache, number, ~self.done, self.tokens)
            steps = min(chunk, most, self.most - number)
            progress = progress._replace(done=self.done)
            cache, progress, new, logprobs = self.engine.decode(cache, progress, rules, steps)
            number += self.take(new, logprobs, steps)
        answers, values = np.concatenate(self.new, axis=1), np.concatenate(self.logprobs, axis=1)
        return self.result(answers, self.lengths, values, self.reasons.tolist())

    def tokens(self, row: int) -> Int[np.ndarray, "new"]:
        """An answer so far."""
        return np.concatenate([chunk[row] for chunk in self.new])

    def take(self, decoded: Array, logprobs: Array, steps: int) -> int:
        """Takes what was decoded, sees which answers have ended, and says how many columns that were."""
        new, values = (np.asarray(x)[:, :steps] for x in to_host((decoded, logprobs)))
        ends = np.isin(new, self.settings.eos_token_id)
        stopped = ends.any(axis=1) & ~self.done
        # Of each row what is up to its first end token, or all.
        kept = np.where(stopped, ends.argmax(axis=1) + 1, steps) * ~self.done
        for watch in self.watches:
            stop = watch(self.padded(new, kept))
            if stop is not None:
                stops = (stop >= 0) & (stop <= kept) & ~self.done
                kept, stopped = np.where(stops, stop, kept), stopped | stops
        values = self.padded(values, kept, 0)
        check_finite(values)
        self.new.append(self.padded(new, kept))
        self.logprobs.append(values)
        self.lengths += kept
        self.reasons[stopped] = "stop"
        self.done |= stopped
        return int(values.shape[1])

    def padded(self, columns: np.ndarray, kept: Int[np.ndarray, "answers"], padding: int | None = None) -> np.ndarray:
        """As many columns as the longest row keeps, and padding where the others have ended."""
        columns = columns[:, : kept.max()]
        pad = self.settings.pad_id if padding is None else padding
        return np.where(np.arange(columns.shape[1]) < kept[:, None], columns, pad)


class Beams(Call):
    """A beam search for the answers that are the likeliest as a whole."""

    def __init__(
        self,
        model: Phi3ForCausalLM,
        lora: Lora | LoraRows | None,
        settings: GenerationConfig,
        tokens: Int[np.ndarray, "batch prompt"],
        mask: Int[np.ndarray, "batch prompt"],
    ):
        super().__init__(model, lora, settings, tokens, mask, settings.num_beams)

    def run(self) -> Generated:
        settings = self.settings
        logits, cache, read = self.read_prompts()
        search = BeamSearch.from_settings(settings, self.most)
        keys = row_keys(settings.seed, len(self.prompts)) if settings.do_sample else None
        state, token = first_beams(search, logits, read, keys)
        number, is_time_up = 1, False
        while number < self.most and bool(to_host(search.unfinished(state))):
            is_time_up = self.time_is_up()
            if is_time_up:
                break
            beams = to_host(state.running.tokens).reshape(len(self.rows), -1)[:, :number]
            cache, most = self.until_crossing(cache, number, np.ones(len(beams), bool), beams.__getitem__)
            steps = min(WATCHED_CHUNK if settings.max_time is not None else CHUNK, most)
            cache, state, token = self.engine.search(cache, search, state, token, keys, steps)
            number = int(to_host(state.step))
        answers = to_host(search.finish(state, settings.num_return_sequences))
        columns = int(answers.lengths.max())
        tokens, logprobs, lengths = (
            x.reshape(len(self.prompts) * settings.num_return_sequences, *x.shape[2:])
            for x in (answers.tokens, answers.logprobs, answers.lengths)
        )
        tokens, logprobs = tokens[:, :columns], logprobs[:, :columns]
        check_finite(logprobs)
        last = tokens[np.arange(len(tokens)), lengths - 1]
        ended = np.isin(last, settings.eos_token_id)
        reasons = np.where(ended, "stop", "time" if is_time_up else "length").tolist()
        return self.result(tokens, lengths, logprobs, reasons, answers.scores.reshape(-1))


NOT_FINITE = (
    "the model's logits are not finite; load it in bfloat16 or float32 where it is float16, and otherwise see to its "
    "adapter, whose numbers are too great, or to its weights"
)


def check_finite(logprobs: np.ndarray) -> None:
    """Raises `InputError` where log-probabilities are not finite."""
    if not np.isfinite(logprobs).all():
        raise InputError(NOT_FINITE)
