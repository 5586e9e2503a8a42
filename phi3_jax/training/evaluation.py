"""What a model makes of the evaluation set: loss, perplexity, accuracy, and answers to its questions."""

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import TypedDict

import jax
import numpy as np
from jaxtyping import Int

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


class EvalFigures(TypedDict, total=False):
    """What an evaluation gives, with 95% bootstrap intervals over rows.

    Attributes:
        eval_loss: mean over target tokens.
        eval_perplexity: its exponential.
        eval_token_accuracy: the share of target tokens that are the most likely ones.
        exact_match: the share of answers equal to the reference.
        eval_loss_interval: lower and upper end, as with the others.
    """

    eval_loss: float
    eval_perplexity: float
    eval_token_accuracy: float
    eval_loss_interval: list[float]
    eval_perplexity_interval: list[float]
    eval_token_accuracy_interval: list[float]
    exact_match: float
    exact_match_interval: list[float]


def evaluate_rows(
    eval_step: EvalStep, trainable: Params, frozen: Params, batches: Iterable[DeviceBatch]
) -> EvalFigures:
    """Loss, perplexity and accuracy over all target tokens of the batches, with their intervals.

    Raises:
        InputError: where there is no target token.
    """
    sums = [eval_step(trainable, frozen, batch) for batch in batches]
    host = jax.device_get(sums)  # once, after everything was handed to the device
    losses, counts, correct = (np.concatenate(part).astype(np.float64) for part in zip(*host, strict=True))
    count = counts.sum()
    if count == 0:
        raise InputError("the evaluation set has no target tokens; check data.loss_on and data.max_length")
    used = counts > 0  # the others are rows that fill up the last batch
    low, high = bootstrap_interval(np.stack([losses, counts], axis=1)[used], samples=_SAMPLES)
    loss = math.fsum(losses) / count
    return {
        "eval_loss": loss,
        "eval_perplexity": _perplexity(loss),
        "eval_token_accuracy": float(correct.sum() / count),
        "eval_loss_interval": [low, high],
        "eval_perplexity_interval": [_perplexity(low), _perplexity(high)],
        "eval_token_accuracy_interval": list(
            bootstrap_interval(np.stack([correct, counts], axis=1)[used], samples=_SAMPLES)
        ),
    }


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


def choose_prompts(
    prompts: Sequence[tuple[Sequence[int] | Int[np.ndarray, "length"], str]], number: int, longest: int
) -> list[Prompt]:
    """The first `number` prompts of at most `longest` tokens."""
    chosen = [prompt for prompt in prompts if 0 < len(prompt[0]) <= longest][:number]
    return [(np.asarray(ids).tolist(), answer) for ids, answer in chosen]


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
