"""LoRA fine-tuning of Phi-3 in JAX.

The model is a frozen Flax object, the adapter a second pytree passed beside it, and everything else
a function of the two.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from phi3_jax.chat.answer import answer
    from phi3_jax.config.lora import LoraConfig
    from phi3_jax.config.model import Phi3Config
    from phi3_jax.config.run import RunConfig
    from phi3_jax.generation import GenerationConfig, generate
    from phi3_jax.hf.pretrained import Phi3ForCausalLM
    from phi3_jax.hf.push import push_to_hub
    from phi3_jax.hf.tokenizer import load_tokenizer
    from phi3_jax.lora import (
        Lora,
        combine,
        eva_init,
        format_parameter_table,
        freeze,
        init_lora,
        loftq_init,
        merge_lora,
        parameter_table,
        partition,
        per_row,
        trainable_mask,
        unmerge_lora,
        weighted_sum,
    )
    from phi3_jax.objectives.next_token import loss
    from phi3_jax.peft.adapter import load_adapter
    from phi3_jax.peft.save import save_adapter
    from phi3_jax.quant import quantize_model
    from phi3_jax.system.errors import InputError
    from phi3_jax.training.loop import train

# Loaded when first asked for: `phi3-jax --help` need not wait for JAX.
_MODULES = {
    "config.model": ("Phi3Config",),
    "system.errors": ("InputError",),
    "chat.answer": ("answer",),
    "generation": ("GenerationConfig", "generate"),
    "hf.push": ("push_to_hub",),
    "hf.tokenizer": ("load_tokenizer",),
    "peft.adapter": ("load_adapter",),
    "peft.save": ("save_adapter",),
    "lora": (
        "Lora",
        "combine",
        "eva_init",
        "format_parameter_table",
        "freeze",
        "init_lora",
        "loftq_init",
        "merge_lora",
        "parameter_table",
        "partition",
        "per_row",
        "trainable_mask",
        "unmerge_lora",
        "weighted_sum",
    ),
    "config.lora": ("LoraConfig",),
    "hf.pretrained": ("Phi3ForCausalLM",),
    "quant": ("quantize_model",),
    "config.run": ("RunConfig",),
    "training.loop": ("train",),
    "objectives.next_token": ("loss",),
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}

__all__ = [
    "GenerationConfig",
    "InputError",
    "Lora",
    "LoraConfig",
    "Phi3Config",
    "Phi3ForCausalLM",
    "RunConfig",
    "answer",
    "combine",
    "eva_init",
    "format_parameter_table",
    "freeze",
    "generate",
    "init_lora",
    "load_adapter",
    "load_tokenizer",
    "loftq_init",
    "loss",
    "merge_lora",
    "parameter_table",
    "partition",
    "per_row",
    "push_to_hub",
    "quantize_model",
    "save_adapter",
    "train",
    "trainable_mask",
    "unmerge_lora",
    "weighted_sum",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULE_OF[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
