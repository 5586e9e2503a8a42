"""What a model makes of the evaluation set: loss, perplexity, accuracy, and answers to its questions."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain, zip_longest
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Float, Int

from phi3_jax.config.sections import EVAL
from phi3_jax.data.batch import DeviceBatch
from phi3_jax.data.tokenizer import Tokenizer
from phi3_jax.generation import GenerationConfig, answer_prompts
from phi3_jax.lora.tree import Lora
from phi3_jax.model.phi3 import Phi3ForCausalLM
from phi3_jax.report.statistics import bootstrap_interval
from phi3_jax.system.errors import InputError
from phi3_jax.training.step import EvalStep, Params, RowSums

# Draws of the bootstrap, of which every evaluation of a run makes so many.
_SAMPLES = 1000

Prompt = tuple[Sequence[int], str]  # the tokens up to the answer, and the answer that the data gives


# What an evaluation gives, with 95% bootstrap intervals over rows: `eval_loss`, the mean over target tokens;
# `eval_perplexity`, its exponential; `eval_token_accuracy`, the share of target tokens that are the most likely ones;
# `exact_match`, the share of answers equal to the reference; and of each `…_interval`, its lower and upper end. Of sets
# with names the same for each, `eval_NAME_loss` and so on, beside those of all their rows together.
EvalFigures = dict[str, float | list[float]]


def value(figures: EvalFigures, name: str) -> float:
    """A figure that is one number.

    Example:
        >>> value({"eval_loss": 0.5, "eval_loss_interval": [0.4, 0.6]}, "eval_loss")
        0.5
    """
    found = figures[name]
    assert not isinstance(found, list), f"{name} is an interval"
    return found


class SetSums(NamedTuple):
    """Sums of every row of a set, or of every sequence of packed rows, that has target tokens.

    Attributes:
        losses: of its target tokens.
        counts: how many these are.
        correct: how many of them are the most likely ones.
    """

    losses: Float[np.ndarray, "rows"]
    counts: Float[np.ndarray, "rows"]
    correct: Float[np.ndarray, "rows"]


def _sum_rows(eval_step: EvalStep, trainable: Params, frozen: Params, batches: Iterable[DeviceBatch]) -> SetSums:
    sums = [eval_step(trainable, frozen, batch) for batch in batches]
    host = jax.device_get(sums)  # once, after everything was handed to the device
    losses, counts, correct = (np.concatenate(part).astype(np.float64) for part in zip(*host, strict=True))
    used = counts > 0  # the others are rows that fill up the last batch
    return SetSums(losses[used], counts[used], correct[used])


def figures_of(sets: Mapping[str, SetSums]) -> EvalFigures:
    """Loss, perplexity and accuracy over all target tokens, with their intervals: of each set, and of all together.

    Args:
        sets: by what stands in front of the names of their figures; alone that is `eval`.

    Example:
        >>> one, other = (SetSums(*np.array([[loss], [2.0], [1.0]])) for loss in (2.0, 4.0))
        >>> found = figures_of({"eval_chats": one, "eval_code": other})
        >>> found["eval_chats_loss"], found["eval_code_loss"], found["eval_loss"], found["eval_token_accuracy"]
        (1.0, 2.0, 1.5, 0.5)
    """
    together = SetSums(*(np.concatenate(part) for part in zip(*sets.values(), strict=True)))
    figures: EvalFigures = {}
    for prefix, sums in {EVAL: together, **sets}.items():
        figures |= {f"{prefix}_{name}": found for name, found in _figures(sums).items()}
    return figures


def _figures(sums: SetSums) -> EvalFigures:
    losses, counts, correct = sums
    count = float(counts.sum())
    low, high = bootstrap_interval(np.stack([losses, counts], axis=1), samples=_SAMPLES)
    loss = math.fsum(losses) / count
    return {
        "loss": loss,
        "perplexity": _perplexity(loss),
        "token_accuracy": float(correct.sum() / count),
        "loss_interval": [low, high],
        "perplexity_interval": [_perplexity(low), _perplexity(high)],
        "token_accuracy_interval": list(bootstrap_interval(np.stack([correct, counts], axis=1), samples=_SAMPLES)),
    }


def evaluate_rows(
    eval_step: EvalStep, trainable: Params, frozen: Params, sets: Mapping[str, Iterable[DeviceBatch]]
) -> EvalFigures:
    """The figures of all batches of some sets, as of `figures_of`.

    Raises:
        InputError: where a set has no target token.
    """
    sums = {}
    for prefix, batches in sets.items():
        found = _sum_rows(eval_step, trainable, frozen, batches)
        if not len(found.counts):
            name = f" {prefix.removeprefix(f'{EVAL}_')}" if prefix != EVAL else ""
            raise InputError(f"the evaluation set{name} has no target tokens; check data.loss_on and data.max_length")
        sums[prefix] = found
    return figures_of(sums)


def _perplexity(loss: float) -> float:
    return math.exp(min(loss, 700.0))  # e**700 is near what a float holds


def row_token_sums(
    eval_step: EvalStep,
    trainable: Params,
    frozen: Params,
    batches: Iterable[tuple[Sequence[int], DeviceBatch]],
) -> Iterator[tuple[int, tuple[float, int, int]]]:
    """Loss sum, target tokens and right tokens of every row, batch after batch.

    The device works on the next batch meanwhile.

    Args:
        eval_step: of `training.step.make_eval_step`.
        trainable: the part of the parameters that trains.
        frozen: the other part.
        batches: each with the rows that its sequences hold, one a sequence; sequences beyond those are padding.

    Yields:
        A row and its sums.
    """
    pending: tuple[Sequence[int], RowSums] | None = None
    for rows, batch in batches:
        ahead = rows, eval_step(trainable, frozen, batch)
        if pending is not None:
            yield from _by_row(*pending)
        pending = ahead
    if pending is not None:
        yield from _by_row(*pending)


def _by_row(rows: Sequence[int], sums: RowSums) -> Iterator[tuple[int, tuple[float, int, int]]]:
    losses, counts, correct = jax.device_get(sums)
    for place, row in enumerate(rows):
        yield row, (float(losses[place]), int(counts[place]), int(correct[place]))


RowPrompt = tuple[Sequence[int] | Int[np.ndarray, "length"], str]


def choose_prompts(sets: Iterable[Sequence[RowPrompt]], number: int, longest: int) -> list[Prompt]:
    """The first `number` prompts of at most `longest` tokens, of each set in turn.

    Example:
        >>> choose_prompts([[([1], "a"), ([2], "b"), ([3], "c")], [([4], "d")]], 3, 8)
        [([1], 'a'), ([4], 'd'), ([2], 'b')]
    """
    fitting = [[prompt for prompt in prompts if 0 < len(prompt[0]) <= longest][:number] for prompts in sets]
    in_turn = [prompt for prompt in chain.from_iterable(zip_longest(*fitting)) if prompt is not None]
    return [(np.asarray(ids).tolist(), answer) for ids, answer in in_turn[:number]]


def answer(
    model: Phi3ForCausalLM,
    lora: Lora | None,
    tokenizer: Tokenizer,
    prompts: Sequence[Prompt],
    *,
    batch_size: int,
    max_new_tokens: int,
    end_ids: tuple[int, ...],
) -> list[str]:
    """Greedy answers as text, special tokens and surrounding space left out."""
    settings = GenerationConfig(max_new_tokens=max_new_tokens, eos_token_id=end_ids)
    tokens = [ids for ids, _ in prompts]
    found = answer_prompts(model, tokenizer, tokens, lora=lora, settings=settings, batch_size=batch_size)
    texts = {index: answer.text.strip() for index, answer in found}
    return [texts[index] for index in range(len(prompts))]


def exact_match(answers: Sequence[str], prompts: Sequence[Prompt]) -> EvalFigures:
    """The share of answers equal to the reference, surrounding space left out, and its interval."""
    hits = np.array([a == reference.strip() for a, (_, reference) in zip(answers, prompts, strict=True)], float)
    return {"exact_match": float(hits.mean()), "exact_match_interval": list(bootstrap_interval(hits))}
