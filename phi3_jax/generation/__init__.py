"""Answers from a model."""

from phi3_jax.generate.decode import generate

__all__ = ["generate"]
