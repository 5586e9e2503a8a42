"""Answers to many prompts, as text."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import numpy as np

from phi3_jax.config.generation import SAMPLING, GenerationConfig
from phi3_jax.config.model import Phi3Config
from phi3_jax.data.tokenizer import Tokenizer
from phi3_jax.data.vocabulary import check_ids
from phi3_jax.generation.answers import Generated
from phi3_jax.generation.decode import answers
from phi3_jax.generation.stop import StopStrings
from phi3_jax.generation.tokens import decode
from phi3_jax.lora import Lora, LoraRows, per_row
from phi3_jax.model.phi3 import Phi3ForCausalLM
from phi3_jax.system.errors import InputError

# How chat templates of the Phi-3 family end a turn; an answer ends there too.
TURN_ENDS = ("<|end|>", "<|im_end|>")


@dataclass(frozen=True)
class Answer:
    """What a model said.

    Attributes:
        text: Without special tokens and the end token, cut before a stop string.
        tokens: All that were generated, an end token or those of a stop string included.
        logprobs: Log-probability of each of them in the model's own distribution.
        finish_reason: "stop" (end token or stop string), "length" (`max_new_tokens`) or "time" (`max_time`).
    """

    text: str
    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish_reason: str


def answer_prompts(
    model: Phi3ForCausalLM,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
    *,
    lora: Lora | LoraRows | None = None,
    settings: GenerationConfig,
    batch_size: int = 8,
) -> Iterator[tuple[int, Answer]]:
    """Answers to prompts of any lengths, batch by batch.

    Prompts of like length are answered together, the longest first. An answer depends neither on
    `batch_size` nor on the other prompts: each prompt draws with a seed of its own, made from
    `settings.seed` and its index.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        prompts: The tokens of each.
        lora: For all prompts, or `per_row` with one adapter for each of them.
        settings: `eos_token_id` should be `end_token_ids`. `seed` may be one for each prompt.
        batch_size: Prompts side by side; each takes `num_return_sequences` or `num_beams` rows.

    Returns:
        (index of the prompt, answer) as batches finish; each prompt `num_return_sequences` times.

    Raises:
        InputError: Before anything is generated, for a prompt that is empty, leaves too little room in the model's
            positions or has a token that the model's embedding has no row for, and for a number of seeds that is
            not that of the prompts.

    Example:
        >>> import phi3_jax as p3
        >>> from flax import nnx
        >>> from tokenizers import Tokenizer, models
        >>> from transformers import PreTrainedTokenizerFast
        >>> words = {f"w{number}": number for number in range(32)}
        >>> tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="w0")))
        >>> size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
        >>> config = p3.Phi3Config(vocab_size=32, **size, num_key_value_heads=2, max_position_embeddings=64)
        >>> model = p3.Phi3ForCausalLM(config, rngs=nnx.Rngs(0))
        >>> settings = GenerationConfig(max_new_tokens=3)
        >>> for index, answer in answer_prompts(model, tokenizer, [[1, 5], [2, 7, 9]], settings=settings):
        ...     print(index, len(answer.tokens), answer.finish_reason)
        1 3 length
        0 3 length
    """
    for index, prompt in enumerate(prompts):
        check_prompt(prompt, f"prompts[{index}]", model.config, settings, tokenizer)
    seeds = prompt_seeds(settings, len(prompts))
    order = sorted(range(len(prompts)), key=lambda index: -len(prompts[index]))
    size = min(batch_size, len(prompts))

    def new_tokens(index: int) -> int:
        return settings.new_tokens(len(prompts[index]), model.config.max_position_embeddings)

    def parts() -> Iterator[tuple[int, list[int]]]:
        # Where max_length says how long an answer may be, it is another length for another prompt.
        for number, indices in groupby(order, new_tokens):
            alike = list(indices)
            for start in range(0, len(alike), size):
                yield number, alike[start : start + size]

    def batches() -> Iterator[tuple[int, Answer]]:
        for number, part in parts():
            rows = part + part[-1:] * (size - len(part))  # one shape, one compilation
            own = settings.with_(seed=tuple(seeds[index] for index in rows), max_new_tokens=number)
            chosen = replace(lora, rows=lora.rows[np.array(rows)]) if isinstance(lora, LoraRows) else lora
            batch = [prompts[index] for index in rows]
            found = _answer_batch(model, tokenizer, batch, chosen, own)
            for row, answer in enumerate(found[: len(part) * settings.num_return_sequences]):
                yield part[row // settings.num_return_sequences], answer

    return batches()


def answer_with_each(
    model: Phi3ForCausalLM,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
    adapters: Mapping[str, Lora | None],
    *,
    settings: GenerationConfig,
    batch_size: int = 8,
) -> Iterator[tuple[int, str, Answer]]:
    """Answers of several adapters to the same prompts, side by side in the same batches.

    With one seed they differ in nothing but the adapter. Adapters with `modules_to_save` cannot share a batch;
    where there is one, the adapters answer one after the other.

    Args:
        model: As in `answer_prompts`, as are the others.
        tokenizer: Its tokenizer.
        prompts: The tokens of each.
        adapters: By name; None for the base alone.
        settings: How to answer.
        batch_size: Rows side by side.

    Returns:
        (index of the prompt, name of the adapter, answer) as batches finish.
    """
    names = list(adapters)
    loras = [lora for lora in adapters.values() if lora is not None]
    seeds = prompt_seeds(settings, len(prompts))
    if len(names) == 1 or not loras or any(lora.saved for lora in loras):
        own = settings.with_(seed=seeds)
        runs = [
            (name, answer_prompts(model, tokenizer, prompts, lora=lora, settings=own, batch_size=batch_size))
            for name, lora in adapters.items()
        ]
        return ((index, name, answer) for name, run in runs for index, answer in run)
    places = iter(range(len(loras)))
    rows = [-1 if lora is None else next(places) for lora in adapters.values()]
    number = len(names)
    pairs = answer_prompts(
        model,
        tokenizer,
        [prompt for prompt in prompts for _ in names],
        lora=per_row(loras, np.array(rows * len(prompts))),
        settings=settings.with_(seed=tuple(seed for seed in seeds for _ in names)),
        batch_size=batch_size,
    )
    return ((index // number, names[index % number], answer) for index, answer in pairs)


def check_prompt(
    prompt: Sequence[int], where: str, config: Phi3Config, settings: GenerationConfig, tokenizer: Tokenizer
) -> None:
    """Looks at a prompt's length and tokens.

    Raises:
        InputError: For a prompt that is empty, or too long for an answer of `max_new_tokens`, and for a token that the
            model's embedding has no row for.
    """
    if not len(prompt):
        raise InputError(f"{where} is empty; give at least one token")
    try:
        new = settings.new_tokens(len(prompt), config.max_position_embeddings)
    except InputError as error:
        raise InputError(f"{where}: {error}") from error
    room = config.max_position_embeddings - new
    if len(prompt) > room:
        raise InputError(
            f"{where} has {len(prompt)} tokens; with max_new_tokens {new} the model's "
            f"{config.max_position_embeddings} positions leave room for {max(room, 0)}; shorten one of them"
        )
    check_ids(prompt, config.vocab_size, where, tokenizer)


def prompt_seeds(settings: GenerationConfig, number: int) -> tuple[int, ...]:
    """A seed for each of so many prompts: those of `settings`, or made from its one and the prompt's index."""
    if isinstance(settings.seed, tuple):
        if len(settings.seed) != number:
            raise InputError(f"there are {len(settings.seed)} seeds for {number} prompts; give one, or one for each")
        return settings.seed
    return tuple(derived_seed(settings.seed, index) for index in range(number))


def derived_seed(seed: int, index: int) -> int:
    """A seed of 31 bits, which every integer type of JAX holds, for one of many draws."""
    return int(np.random.SeedSequence([seed % 2**64, index]).generate_state(1)[0]) >> 1


def end_token_ids(tokenizer: Tokenizer, config: Phi3Config) -> tuple[int, ...]:
    """The tokens that end an answer: those of the checkpoint's configurations and of the tokenizer,
    and the end of a turn in Phi-3's templates, which the first configurations forgot."""
    ends = set(config.end_token_ids)
    if tokenizer.eos_token_id is not None:
        ends.add(tokenizer.eos_token_id)
    vocabulary = tokenizer.get_vocab()
    ends.update(vocabulary[token] for token in TURN_ENDS if token in vocabulary)
    return tuple(sorted(ends))


def answer_settings(
    config: Phi3Config, tokenizer: Tokenizer, given: Mapping[str, object], *, max_new_tokens: int
) -> GenerationConfig:
    """The settings for answers as text: those given over the checkpoint's own, one of the draw switching drawing on.

    Args:
        config: The checkpoint's.
        tokenizer: Its tokenizer.
        given: Fields of `GenerationConfig`; None means not given.
        max_new_tokens: Where neither says how many.

    Raises:
        InputError: As `GenerationConfig.from_model`, and for settings of the draw without one.
    """
    chosen = _with_drawing({name: value for name, value in given.items() if value is not None})
    file = json.loads(config.generation)
    if not any(name in chosen or file.get(name) is not None for name in ("max_new_tokens", "max_length")):
        # A prompt needs some of the positions, too.
        chosen["max_new_tokens"] = min(max_new_tokens, config.max_position_embeddings // 2)
    return GenerationConfig.from_model(config, **{"eos_token_id": end_token_ids(tokenizer, config), **chosen})


def _with_drawing(given: Mapping[str, object]) -> dict[str, object]:
    """The settings with drawing switched by those of the draw. Raises `InputError` where they would have no effect."""
    of_draw: dict[str, Any] = {name: given[name] for name in SAMPLING if name in given}
    # Model cards say it so: temperature 0 is the likeliest token in other words.
    is_off_by_0 = "do_sample" not in given and of_draw.get("temperature") == 0
    if not is_off_by_0 and given.get("do_sample") is not False:
        return {**given, "do_sample": True} if of_draw else dict(given)
    # Defaults say nothing.
    silent = {"temperature": (0, GenerationConfig.temperature)}
    idle = {n: v for n, v in of_draw.items() if v not in silent.get(n, (getattr(GenerationConfig, n),))}
    if idle:
        GenerationConfig(**idle)  # what is out of range is told as that
        name, off_by = next(iter(idle)), "temperature 0" if is_off_by_0 else "do_sample false"
        raise InputError(f"{name} is {idle[name]!r}, which has no effect with {off_by}; leave one out")
    return {**{name: value for name, value in given.items() if name not in SAMPLING}, "do_sample": False}


def padding_id(tokenizer: Tokenizer, config: Phi3Config) -> int:
    """What fills rows up, which nobody looks at: the checkpoint's padding token, else the tokenizer's, else 0."""
    return next((token for token in (config.pad_token_id, tokenizer.pad_token_id) if token is not None), 0)


def _answer_batch(
    model: Phi3ForCausalLM,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
    lora: Lora | LoraRows | None,
    settings: GenerationConfig,
) -> list[Answer]:
    """`num_return_sequences` answers to each prompt, in order."""
    width = max(map(len, prompts))
    ids = np.full((len(prompts), width), settings.pad_id, np.int32)
    mask = np.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = prompt
        mask[row, width - len(prompt) :] = 1
    out = answers(model, ids, mask, lora, settings, tokenizer)
    return answers_of(
        out, tokenizer, [prompts[row // settings.num_return_sequences] for row in range(len(out.sequences))], settings
    )


def answers_of(
    out: Generated, tokenizer: Tokenizer, prompts: Sequence[Sequence[int]], settings: GenerationConfig
) -> list[Answer]:
    """The rows of what `generate` gave, with their texts; `prompts`, each row's tokens without padding."""
    width = out.sequences.shape[1] - out.logprobs.shape[1]
    lengths = out.lengths.tolist()
    rows = [sequence[width : width + length] for sequence, length in zip(out.sequences, lengths, strict=True)]
    stops = StopStrings(tokenizer, settings.stop_strings, prompts)
    stops(rows)
    found = []
    for row, (new, logprobs) in enumerate(zip(rows, out.logprobs, strict=True)):
        tokens = new.tolist()
        has_end = bool(tokens) and tokens[-1] in settings.eos_token_id and not stops.has_ended(row)
        text = decode(tokenizer, tokens[:-1]) if has_end else stops.text(row)
        kept = tuple(logprobs[: len(tokens)].tolist())
        found.append(Answer(text, tuple(tokens), kept, out.finish_reasons[row]))
    return found
