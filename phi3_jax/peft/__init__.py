"""Adapters in PEFT's files, both ways."""
