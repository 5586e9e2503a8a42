"""The command line `phi3-jax`."""

from phi3_jax.cli.main import main

__all__ = ["main"]
