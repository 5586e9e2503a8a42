"""What transformers' `generate` and its `GenerationConfig` take beside what is implemented here."""

from collections.abc import Mapping

from phi3_jax.config.foreign import table

# What would change an answer or what comes beside it, and has no effect from a file, with the values that mean "off"
# beside None; settings that a file may have, too, are in foreign.yaml.
_ARGUMENTS: dict[str, tuple[object, ...]] = {
    "output_attentions": (False,),
    "output_hidden_states": (False,),
    "output_scores": (False,),
    "output_logits": (False,),
    "inputs": (),
    "inputs_embeds": (),
    "logits_processor": ([],),
    "stopping_criteria": ([],),
    "prefix_allowed_tokens_fn": (),
    "negative_prompt_ids": (),
    "negative_prompt_attention_mask": (),
    "custom_generate": (),
    "position_ids": (),
    "past_key_values": (),
    "token_type_ids": (),
    "labels": (),
}

# Settings of the draw, which have no effect where nothing is drawn.
_OF_THE_DRAW = ("typical_p", "top_h", "epsilon_cutoff", "eta_cutoff")
# What changes how transformers computes, and no answer; what belongs to encoders, to files and to its versions.
_NO_EFFECT = """
assistant_confidence_threshold assistant_early_exit assistant_ensemble_weight assistant_lookbehind assistant_model
assistant_tokenizer bos_token_id cache_config cache_implementation cache_position compile_config
continuous_batching_config decoder_start_token_id disable_compile is_assistant logits_to_keep low_memory max_cache_len
max_matching_ngram_size num_assistant_tokens num_assistant_tokens_schedule prefill_chunk_size prompt_lookup_num_tokens
return_dict return_dict_in_generate speculation_type synced_gpus target_lookbehind transformers_version
trust_remote_code use_cache use_model_defaults use_mtp
"""
NO_EFFECT = frozenset(_NO_EFFECT.split())


def not_implemented() -> dict[str, tuple[object, ...]]:
    """The settings that transformers has and nothing here implements, with the values that mean "off".

    Example:
        >>> not_implemented()["no_repeat_ngram_size"]
        (0,)
    """
    return {name: tuple(off) for name, off in table().generation.items()}


def asked_for(settings: Mapping[str, object], *, draws: bool, in_a_file: bool = False) -> dict[str, object]:
    """Those of the settings that ask for what is not implemented.

    Args:
        settings: By name.
        draws: Whether tokens are drawn.
        in_a_file: They are from generation_config.json, where some have no effect.

    Example:
        >>> asked_for({"no_repeat_ngram_size": 3, "typical_p": 0.9, "top_k": 5}, draws=False)
        {'no_repeat_ngram_size': 3}
    """
    known = not_implemented() | ({} if in_a_file else _ARGUMENTS)
    return {
        name: value
        for name, value in settings.items()
        if name in known
        and value is not None
        and not any(_is_same(value, off) for off in known[name])
        and (draws or name not in _OF_THE_DRAW)
    }


def is_known(name: str) -> bool:
    """Whether transformers' `generate` takes a setting of this name.

    Example:
        >>> is_known("use_cache"), is_known("use_cash")
        (True, False)
    """
    return name in NO_EFFECT or name in _ARGUMENTS or name in not_implemented()


def _is_same(value: object, off: object) -> bool:
    # Arrays, which compare element by element, are never off.
    return isinstance(value, bool | int | float | str | list | tuple) and value == off
