"""What a model makes of the evaluation set: loss, perplexity, accuracy, and answers to its questions."""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from phi3_jax.config import Phi3Config
from phi3_jax.errors import InputError
from phi3_jax.generation import generate
from phi3_jax.lora.tree import Lora
from phi3_jax.model.phi3 import Phi3ForCausalLM
from phi3_jax.training.step import Params

# How chat templates of the Phi-3 family end a turn; an answer ends there too.
TURN_ENDS = ("<|end|>", "<|im_end|>")

Prompt = tuple[Sequence[int], str]  # the tokens up to the answer, and the answer that the data gives


def evaluate_rows(
    eval_step: Callable[..., tuple[Array, Array, Array]],
    trainable: Params,
    frozen: Params,
    batches: Iterable[dict[str, Array]],
) -> dict[str, float]:
    """`eval_loss`, `eval_perplexity` and `eval_token_accuracy` over all target tokens of the batches.

    Raises `InputError` where there is no target token.
    """
    sums = [eval_step(trainable, frozen, batch) for batch in batches]
    host = jax.device_get(sums)  # once, after everything was handed to the device
    count = sum(int(part[1]) for part in host)
    if count == 0:
        raise InputError("the evaluation set has no target tokens; check data.loss_on and data.max_length")
    loss = math.fsum(float(part[0]) for part in host) / count
    return {
        "eval_loss": loss,
        "eval_perplexity": math.exp(min(loss, 700.0)),  # e**700 is near what a float holds
        "eval_token_accuracy": sum(int(part[2]) for part in host) / count,
    }


def end_token_ids(tokenizer: Any, config: Phi3Config) -> tuple[int, ...]:
    """The tokens that end an answer: those of the checkpoint's configurations and of the tokenizer,
    and the end of a turn in Phi-3's templates, which the first configurations forgot."""
    ends = set(config.end_token_ids)
    if tokenizer.eos_token_id is not None:
        ends.add(tokenizer.eos_token_id)
    vocabulary = tokenizer.get_vocab()
    ends.update(vocabulary[token] for token in TURN_ENDS if token in vocabulary)
    return tuple(sorted(ends))


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
    longest = max(len(ids) for ids, _ in prompts)
    answers: list[str] = []
    for start in range(0, len(prompts), batch_size):
        part = [ids for ids, _ in prompts[start : start + batch_size]]
        # Rows repeated to fill the batch: one shape, one compilation.
        rows = part + [part[-1]] * (min(batch_size, len(prompts)) - len(part))
        mask = np.array([[0] * (longest - len(ids)) + [1] * len(ids) for ids in rows], np.int32)
        tokens = np.zeros_like(mask)
        for row, ids in enumerate(rows):
            tokens[row, longest - len(ids) :] = ids
        out = generate(
            model,
            jnp.asarray(tokens),
            attention_mask=jnp.asarray(mask),
            lora=lora,
            max_new_tokens=max_new_tokens,
            eos_token_id=end_ids,
            pad_token_id=end_ids[0] if end_ids else None,
        )
        for new in np.asarray(out)[: len(part), longest:]:
            stop = np.flatnonzero(np.isin(new, end_ids))
            kept = new[: stop[0]] if stop.size else new
            answers.append(tokenizer.decode(kept, skip_special_tokens=True).strip())
    return answers


def exact_match(answers: Sequence[str], prompts: Sequence[Prompt]) -> float:
    """Share of answers equal to the reference, surrounding space left out."""
    return sum(a == reference.strip() for a, (_, reference) in zip(answers, prompts, strict=True)) / len(answers)
