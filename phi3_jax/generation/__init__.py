"""Answers from a model."""

from phi3_jax.config.generation import GenerationConfig
from phi3_jax.generation.answers import Generated
from phi3_jax.generation.decode import generate
from phi3_jax.generation.text import Answer, answer_prompts, end_token_ids, padding_id

__all__ = ["Answer", "Generated", "GenerationConfig", "answer_prompts", "end_token_ids", "generate", "padding_id"]
