"""What came of a run: the report."""

from phi3_jax.evaluate.report import write_report

__all__ = ["write_report"]
