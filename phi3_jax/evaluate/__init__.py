"""Evaluations: base, adapters and merged checkpoints on the same rows, and what they come to."""

from phi3_jax.evaluate.results import Results
from phi3_jax.evaluate.run import evaluate

__all__ = ["Results", "evaluate"]
