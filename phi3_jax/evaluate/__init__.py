"""What came of a run or an evaluation: figures, and the report."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from phi3_jax.evaluate.report import write_evaluation_report, write_report
    from phi3_jax.evaluate.results import Results
    from phi3_jax.evaluate.run import evaluate

__all__ = ["Results", "evaluate", "write_evaluation_report", "write_report"]

# Loaded when asked for: statistics and report are below training, an evaluation is above it.
_MODULE_OF = {
    "Results": "results",
    "evaluate": "run",
    "write_evaluation_report": "report",
    "write_report": "report",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
