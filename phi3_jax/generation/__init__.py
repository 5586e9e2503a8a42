"""Answers from a model."""

from phi3_jax.generation.decode import generate

__all__ = ["generate"]
