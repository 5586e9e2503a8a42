"""`generate`, of tokens."""

from typing import Any

import numpy as np
from jaxtyping import ArrayLike, Int

from phi3_jax.config.generation import GenerationConfig
from phi3_jax.generation.answers import Answers, Beams, Watch
from phi3_jax.lora import Lora, LoraRows
from phi3_jax.model.phi3 import Phi3ForCausalLM
from phi3_jax.system.errors import InputError


def generate(
    model: Phi3ForCausalLM,
    input_ids: Int[ArrayLike, "batch prompt"],
    *,
    attention_mask: Int[ArrayLike, "batch prompt"] | None = None,
    lora: Lora | LoraRows | None = None,
    generation_config: GenerationConfig | None = None,
    tokenizer: Any = None,
    streamer: Watch | None = None,
    return_dict_in_generate: bool = False,
    **settings: Any,
) -> Any:
    """The prompts, each followed by the model's answer, as transformers' `generate`.

    Rows do not depend on one another, neither in tokens nor in what is drawn.

    **Arguments**
    - `input_ids`, `attention_mask`: prompts, padded on the left where they differ in length.
    - `lora`: adapters to apply; `per_row(...)` for another one in each row.
    - `generation_config`: how; default: the checkpoint's own settings, `GenerationConfig.from_model`.
    - `settings`: fields of `GenerationConfig` that are to be otherwise.
    - `tokenizer`: needed for `stop_strings`.
    - `streamer`: a `Watch`, called on the host with the new tokens after every few steps.

    **Returns** tokens `[batch * num_return_sequences, prompt + new]`, a numpy array, which tokenizers decode; or
    with `return_dict_in_generate` a `Generated`.

    Raises `InputError` for a prompt that leaves no room in the model's positions, for padding on the right,
    for settings out of range, and where the model's logits are not finite.
    """
    if generation_config is None:
        chosen = GenerationConfig.from_model(model.config, **settings)
    else:
        chosen = generation_config.with_(**{name: value for name, value in settings.items() if value is not None})
    tokens, mask = _read_arguments(model, input_ids, attention_mask, chosen)
    if chosen.stop_strings and tokenizer is None:
        raise InputError(f"stop_strings are {chosen.stop_strings!r}, but there is no tokenizer; give one")
    if chosen.num_beams > 1 and (chosen.stop_strings or streamer is not None):
        raise InputError(
            f"num_beams is {chosen.num_beams}, and a beam search knows its answers only at its end; "
            "leave out stop_strings and streaming, or set num_beams to 1"
        )
    if chosen.num_beams > 1:
        result = Beams(model, lora, chosen, tokens, mask).run()
    else:
        result = Answers(model, lora, chosen, tokens, mask, tokenizer, streamer).run()
    return result if return_dict_in_generate else result.sequences


def _read_arguments(
    model: Phi3ForCausalLM, input_ids: Any, attention_mask: Any, settings: GenerationConfig
) -> tuple[Int[np.ndarray, "batch prompt"], Int[np.ndarray, "batch prompt"]]:
    tokens = np.asarray(input_ids, np.int32)
    if tokens.ndim != 2:
        raise InputError(f"input_ids have shape {tokens.shape}, expected [batch, prompt]")
    if tokens.size == 0:
        raise InputError("the prompt is empty; give at least one token")
    mask = np.ones_like(tokens) if attention_mask is None else np.asarray(attention_mask, np.int32)
    if mask.shape != tokens.shape:
        raise InputError(f"attention_mask has shape {mask.shape}, expected that of input_ids, {tokens.shape}")
    if not np.all(mask[:, -1] == 1):
        raise InputError("a prompt is padded on the right; pad on the left, so that its answer follows it")
    if np.any(np.diff(mask, axis=1) < 0):
        raise InputError("attention_mask has 0 between tokens of a prompt; only padding on the left has it")
    longest, positions = int(mask.sum(axis=1).max()), model.config.max_position_embeddings
    if longest + settings.max_new_tokens > positions:
        raise InputError(
            f"a prompt of {longest} tokens and {settings.max_new_tokens} new ones exceed the model's "
            f"{positions} positions; shorten one of them"
        )
    return tokens, mask
