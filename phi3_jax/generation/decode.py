"""`generate`, of tokens."""

from collections.abc import Mapping

import numpy as np
from jaxtyping import ArrayLike, Int

from phi3_jax.config.generation import GenerationConfig
from phi3_jax.data.tokenizer import Tokenizer
from phi3_jax.data.vocabulary import check_ids
from phi3_jax.generation.answers import Answers, Beams, Generated, Watch
from phi3_jax.lora import Lora, LoraRows
from phi3_jax.model.phi3 import Phi3ForCausalLM
from phi3_jax.system.errors import InputError
from phi3_jax.system.text import shown


def generate(
    model: Phi3ForCausalLM,
    input_ids: Int[ArrayLike, "batch prompt"],
    *,
    attention_mask: Int[ArrayLike, "batch prompt"] | None = None,
    lora: Lora | LoraRows | None = None,
    generation_config: GenerationConfig | None = None,
    tokenizer: Tokenizer | None = None,
    streamer: Watch | None = None,
    return_dict_in_generate: bool = False,
    **settings: object,
) -> Int[np.ndarray, "answers total"] | Generated:
    """The prompts, each followed by the model's answer, as transformers' `generate`.

    Rows do not depend on one another, neither in tokens nor in what is drawn.

    Args:
        model: The model.
        input_ids: Prompts, padded on the left where they differ in length.
        attention_mask: 0 at the padding; default: there is none.
        lora: Adapters to apply; `per_row(...)` for another one in each row.
        generation_config: How; default: the checkpoint's own settings, `GenerationConfig.from_model`.
        tokenizer: Needed for `stop_strings`; tells the name of a token that the model's embedding has no row for.
        streamer: A `Watch`, called on the host with the new tokens after every few steps.
        return_dict_in_generate: Whether lengths, log-probabilities and reasons are wanted, too.
        settings: Fields of `GenerationConfig` that are to be otherwise.

    Returns:
        Tokens `[batch * num_return_sequences, prompt + new]`, a numpy array, which tokenizers decode; or with
        `return_dict_in_generate` a `Generated`.

    Raises:
        InputError: For a prompt that leaves no room in the model's positions, for an id that its embedding has no row
            for, for text in place of tokens, for padding on the right, for settings out of range, and where the
            model's logits are not finite.

    Example:
        >>> from flax import nnx
        >>> import phi3_jax as p3
        >>> size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
        >>> config = p3.Phi3Config(vocab_size=32, **size, num_key_value_heads=2, max_position_embeddings=64)
        >>> model = p3.Phi3ForCausalLM(config, rngs=nnx.Rngs(0))
        >>> p3.generate(model, [[1, 5, 9]], max_new_tokens=4).shape
        (1, 7)
        >>> answer = p3.generate(model, [[1, 5, 9]], max_new_tokens=4, return_dict_in_generate=True)
        >>> answer.lengths.tolist(), answer.finish_reasons
        ([4], ('length',))
    """
    check_loaded(model, lora)
    if generation_config is None:
        chosen = GenerationConfig.from_model(model.config, **settings)
    else:
        chosen = generation_config.with_(**{name: value for name, value in settings.items() if value is not None})
    result = answers(model, input_ids, attention_mask, lora, chosen, tokenizer, streamer)
    return result if return_dict_in_generate else result.sequences


def answers(
    model: Phi3ForCausalLM,
    input_ids: Int[ArrayLike, "batch prompt"],
    attention_mask: Int[ArrayLike, "batch prompt"] | None,
    lora: Lora | LoraRows | None,
    settings: GenerationConfig,
    tokenizer: Tokenizer | None,
    streamer: Watch | None = None,
) -> Generated:
    """What `generate` gives with `return_dict_in_generate`."""
    check_loaded(model, lora)
    tokens, mask = _read_arguments(model, input_ids, attention_mask, settings, tokenizer)
    if settings.stop_strings and tokenizer is None:
        raise InputError(f"stop_strings are {settings.stop_strings!r}, but there is no tokenizer; give one")
    if settings.num_beams > 1 and (settings.stop_strings or streamer is not None):
        raise InputError(
            f"num_beams is {settings.num_beams}, and a beam search knows its answers only at its end; "
            "leave out stop_strings and streaming, or set num_beams to 1"
        )
    if settings.num_beams > 1:
        return Beams(model, lora, settings, tokens, mask).run()
    return Answers(model, lora, settings, tokens, mask, tokenizer, streamer).run()


def _read_arguments(
    model: Phi3ForCausalLM,
    input_ids: Int[ArrayLike, "batch prompt"],
    attention_mask: Int[ArrayLike, "batch prompt"] | None,
    settings: GenerationConfig,
    tokenizer: Tokenizer | None,
) -> tuple[Int[np.ndarray, "batch prompt"], Int[np.ndarray, "batch prompt"]]:
    _refuse_text(input_ids)
    tokens = np.asarray(input_ids)
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
    new = settings.new_tokens(longest, positions)
    if longest + new > positions:
        raise InputError(
            f"a prompt of {longest} tokens and {new} new ones exceed the model's {positions} positions; shorten one "
            "of them"
        )
    check_ids(np.where(mask == 1, tokens, 0), model.config.vocab_size, "input_ids", tokenizer)
    return tokens.astype(np.int32), mask


def check_loaded(model: object, lora: object) -> None:
    """Looks whether a model and adapters are themselves, not the paths that they are at.

    Raises:
        InputError: They are not, with the call that loads them.

    Example:
        >>> from phi3_jax.generation.decode import check_loaded
        >>> check_loaded("out/model", None)
        Traceback (most recent call last):
        phi3_jax.system.errors.InputError: the model is 'out/model'; load it: Phi3ForCausalLM.from_pretrained(path)
    """
    if not isinstance(model, Phi3ForCausalLM):
        raise InputError(f"the model is {shown(model)}; load it: Phi3ForCausalLM.from_pretrained(path)")
    if lora is not None and not isinstance(lora, Lora | LoraRows):
        raise InputError(f"lora is {shown(lora)}, expected adapters; load them: load_adapter(path, model)")


def _refuse_text(given: object) -> None:
    """Raises `InputError` for text, messages and a tokenizer's dictionary, with the call that takes them."""
    if isinstance(given, Mapping) and "input_ids" in given:
        raise InputError("input_ids are a tokenizer's dictionary; give its parts: generate(model, **inputs)")
    first = given
    while isinstance(first, list | tuple | np.ndarray) and len(first):
        first = first[0]
    if isinstance(first, str | bytes):
        raise InputError(
            f"input_ids are text, {shown(first)}, and generate takes tokens; for an answer as text: "
            "answer(model, tokenizer, text)"
        )
    if isinstance(first, Mapping):
        raise InputError(
            "input_ids are messages, and generate takes tokens; for an answer as text: "
            "answer(model, tokenizer, messages)"
        )
