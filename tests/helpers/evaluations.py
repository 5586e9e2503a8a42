"""What the tests of evaluations share."""

from pathlib import Path

from phi3_jax.config.sections import DataSection
from phi3_jax.evaluate import evaluate

ROWS = 7


SETTINGS = {"metrics": "loss,chrf,exact_match", "max_new_tokens": 6, "batch_size": 3}


def arguments(inputs: Path, *more: object) -> list[str]:
    argv = ["evaluate", "--model", inputs / "base", "--data", inputs / "chats.jsonl", "--max-length", 32, *more]
    return list(map(str, argv))


def run(inputs, out, **more):
    """The base and one adapter, by the Python function."""
    rows = DataSection(train=str(inputs / "chats.jsonl"), max_length=32)
    settings = {"data": rows, "adapters": {"one": inputs / "one" / "adapter"}, "output_dir": out, **SETTINGS}
    return evaluate(inputs / "base", **{**settings, **more})
