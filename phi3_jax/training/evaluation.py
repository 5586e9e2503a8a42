"""What a model makes of the evaluation set: loss, perplexity, accuracy, and answers to its questions."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Array

from phi3_jax.generation import GenerationConfig, answer_prompts
from phi3_jax.lora.tree import Lora
from phi3_jax.model.phi3 import Phi3ForCausalLM
from phi3_jax.report.statistics import bootstrap_interval
from phi3_jax.system.errors import InputError
from phi3_jax.training.step import Params

# Draws of the bootstrap, of which every evaluation of a run makes so many.
_SAMPLES = 1000

Prompt = tuple[Sequence[int], str]  # the tokens up to the answer, and the answer that the data gives


def evaluate_rows(
    eval_step: Callable[..., tuple[Array, Array, Array]],
    trainable: Params,
    frozen: Params,
    batches: Iterable[dict[str, Array]],
) -> dict[str, Any]:
    """`eval_loss`, `eval_perplexity` and `eval_token_accuracy` over all target tokens of the batches, and under
    `eval_loss_interval` and so on their 95% bootstrap intervals over rows.

    Raises `InputError` where there is no target token.
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
    eval_step: Callable[..., tuple[Array, Array, Array]],
    trainable: Params,
    frozen: Params,
    batches: Iterable[tuple[Sequence[int], dict[str, Array]]],
) -> Iterator[tuple[int, tuple[float, int, int]]]:
    """Loss sum, target tokens and right tokens of every row, batch after batch.

    **Arguments**: `batches`, each with the rows that its sequences hold, one a sequence; sequences
    beyond those are padding.

    **Returns** pairs of a row and its sums. The device works on the next batch meanwhile.
    """
    pending: tuple[Sequence[int], tuple[Array, ...]] | None = None
    for rows, batch in batches:
        ahead = rows, eval_step(trainable, frozen, batch)
        if pending is not None:
            yield from _by_row(*pending)
        pending = ahead
    if pending is not None:
        yield from _by_row(*pending)


def _by_row(rows: Sequence[int], sums: tuple[Array, ...]) -> Iterator[tuple[int, tuple[float, int, int]]]:
    losses, counts, correct = jax.device_get(sums)
    for place, row in enumerate(rows):
        yield row, (float(losses[place]), int(counts[place]), int(correct[place]))


def choose_prompts(prompts: Sequence[Prompt], number: int, longest: int) -> list[Prompt]:
    """The first `number` prompts of at most `longest` tokens."""
    return [prompt for prompt in prompts if 0 < len(prompt[0]) <= longest][:number]


def answer(
    model: Phi3ForCausalLM,
    lora: Lora | None,
    tokenizer: Any,
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


def exact_match(answers: Sequence[str], prompts: Sequence[Prompt]) -> dict[str, Any]:
    """`exact_match`, the share of answers equal to the reference, surrounding space left out, and its interval."""
    hits = np.array([a == reference.strip() for a, (_, reference) in zip(answers, prompts, strict=True)], float)
    return {"exact_match": float(hits.mean()), "exact_match_interval": list(bootstrap_interval(hits))}
