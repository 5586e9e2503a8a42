"""LoRA fine-tuning of Phi-3 in JAX."""

from phi3_jax.config import LoraConfig, Phi3Config
from phi3_jax.errors import InputError
from phi3_jax.model import Phi3ForCausalLM

__all__ = ["InputError", "LoraConfig", "Phi3Config", "Phi3ForCausalLM"]
