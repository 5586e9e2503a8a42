"""LoRA: adapters in a pytree of their own, beside a frozen model."""

from phi3_jax.lora.adapters import Lora, LoraEmbedding, LoraLinear
from phi3_jax.lora.init import init_lora
from phi3_jax.lora.mask import combine, freeze, partition, trainable_mask
from phi3_jax.lora.merge import merge_lora, unmerge_lora
from phi3_jax.lora.table import ParameterTable, format_parameter_table, parameter_table
from phi3_jax.lora.targets import Module, adaptable_modules, match_targets

__all__ = [
    "Lora",
    "LoraEmbedding",
    "LoraLinear",
    "Module",
    "ParameterTable",
    "adaptable_modules",
    "combine",
    "format_parameter_table",
    "freeze",
    "init_lora",
    "match_targets",
    "merge_lora",
    "parameter_table",
    "partition",
    "trainable_mask",
    "unmerge_lora",
]
