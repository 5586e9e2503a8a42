"""LoRA: adapters in a pytree of their own, beside a frozen model."""

from phi3_jax.lora.adapters import (
    DoraEmbedding,
    DoraLinear,
    HeadRows,
    LoraEmbedding,
    LoraLinear,
    ResidualLora,
    TokenRows,
)
from phi3_jax.lora.eva import eva_init
from phi3_jax.lora.fresh import init_lora
from phi3_jax.lora.loftq import LoftqQuantizer, loftq_init
from phi3_jax.lora.mask import combine, freeze, partition, trainable_mask
from phi3_jax.lora.merge import merge_lora, unmerge_lora
from phi3_jax.lora.rows import LoraRows, per_row
from phi3_jax.lora.stack import ByLayer
from phi3_jax.lora.sums import weighted_sum
from phi3_jax.lora.table import ParameterTable, format_parameter_table, parameter_table
from phi3_jax.lora.targets import Module, adaptable_modules, config_targets, match_targets
from phi3_jax.lora.tree import Lora

__all__ = [
    "ByLayer",
    "DoraEmbedding",
    "DoraLinear",
    "HeadRows",
    "LoftqQuantizer",
    "Lora",
    "LoraEmbedding",
    "LoraLinear",
    "LoraRows",
    "Module",
    "ParameterTable",
    "ResidualLora",
    "TokenRows",
    "adaptable_modules",
    "combine",
    "config_targets",
    "eva_init",
    "format_parameter_table",
    "freeze",
    "init_lora",
    "loftq_init",
    "match_targets",
    "merge_lora",
    "parameter_table",
    "partition",
    "per_row",
    "trainable_mask",
    "unmerge_lora",
    "weighted_sum",
]
