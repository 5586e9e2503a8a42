"""Phi-3 in Flax NNX."""

from phi3_jax.model.phi3 import Phi3ForCausalLM

__all__ = ["Phi3ForCausalLM"]
