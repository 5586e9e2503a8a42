"""LoRA fine-tuning of Phi-3 in JAX.

The model is a frozen Flax object, the adapter a second pytree passed beside it, and everything else
a function of the two.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from phi3_jax.config import LoraConfig, Phi3Config
    from phi3_jax.errors import InputError
    from phi3_jax.generation import generate
    from phi3_jax.hf.hub import load_tokenizer
    from phi3_jax.hf.peft import load_adapter, save_adapter
    from phi3_jax.lora import (
        Lora,
        combine,
        format_parameter_table,
        freeze,
        init_lora,
        merge_lora,
        parameter_table,
        partition,
        trainable_mask,
        unmerge_lora,
    )
    from phi3_jax.model import Phi3ForCausalLM
    from phi3_jax.run_config import RunConfig
    from phi3_jax.training.loop import train
    from phi3_jax.training.loss import loss

# Loaded when first asked for: `phi3-jax --help` need not wait for JAX.
_MODULES = {
    "config": ("LoraConfig", "Phi3Config"),
    "errors": ("InputError",),
    "generation": ("generate",),
    "hf.hub": ("load_tokenizer",),
    "hf.peft": ("load_adapter", "save_adapter"),
    "lora": (
        "Lora",
        "combine",
        "format_parameter_table",
        "freeze",
        "init_lora",
        "merge_lora",
        "parameter_table",
        "partition",
        "trainable_mask",
        "unmerge_lora",
    ),
    "model": ("Phi3ForCausalLM",),
    "run_config": ("RunConfig",),
    "training.loop": ("train",),
    "training.loss": ("loss",),
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}

__all__ = [
    "InputError",
    "Lora",
    "LoraConfig",
    "Phi3Config",
    "Phi3ForCausalLM",
    "RunConfig",
    "combine",
    "format_parameter_table",
    "freeze",
    "generate",
    "init_lora",
    "load_adapter",
    "load_tokenizer",
    "loss",
    "merge_lora",
    "parameter_table",
    "partition",
    "save_adapter",
    "train",
    "trainable_mask",
    "unmerge_lora",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULE_OF[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
