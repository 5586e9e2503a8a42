"""Hugging Face's files, both ways: checkpoints, adapters, tokenizers, and the hub."""
