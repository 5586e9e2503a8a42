"""The built-in default: a small base model and a chat set; the recipe `demo` fine-tunes one on the other."""

from pathlib import Path

FILES = ("base", "orders_train.jsonl", "orders_eval.jsonl")


def demo_path(name: str) -> Path:
    """Where one of the demo's files lies in the installed package."""
    if name not in FILES:
        raise ValueError(f"{name!r} is no file of the demo; expected one of {', '.join(FILES)}")
    return Path(__file__).parent / name
