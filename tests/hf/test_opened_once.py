"""A command opens its checkpoint once, and its adapter, and reads config.json once."""

import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from phi3_jax.cli import main
from phi3_jax.hf import checkpoint, info, tokenizer
from phi3_jax.hf.hub import resolve_checkpoint
from phi3_jax.peft import adapter
from tests.helpers.checkpoints import write_checkpoint
from tests.helpers.rows import write_chats

_watched: dict[str, Callable[[str], None]] = {}


def _opened(event: str, arguments: tuple[object, ...]) -> None:
    """Tells of every file that Python opens while somebody watches."""
    if event == "open" and _watched and isinstance(arguments[0], str | os.PathLike):
        _watched["open"](os.fspath(arguments[0]))


sys.addaudithook(_opened)


@contextmanager
def counted(monkeypatch) -> Iterator[Counter[str]]:
    """Counts what is resolved, by its name, and the files that are opened, by their paths."""
    found: Counter[str] = Counter()

    def resolve(name, *arguments, **options):
        found[f"resolve {Path(name).name}"] += 1
        return resolve_checkpoint(name, *arguments, **options)

    def count(path: str) -> None:
        # Whoever else looks at a file's bytes for a fingerprint does not ask what it says.
        frame = sys._getframe(2)
        names = []
        while frame is not None:
            names.append(frame.f_code.co_name)
            frame = frame.f_back
        if "weights_fingerprint" not in names:
            found[path] += 1

    with monkeypatch.context() as patch:
        for module in (checkpoint, adapter, tokenizer, info):
            if hasattr(module, "resolve_checkpoint"):
                patch.setattr(module, "resolve_checkpoint", resolve)
        _watched["open"] = count
        try:
            yield found
        finally:
            _watched.clear()


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("once")
    write_checkpoint(folder / "base")
    write_chats(folder / "chats.jsonl", number=4)
    assert main(train(folder, "out")) == 0
    return folder


def train(folder: Path, output: str, *more: str) -> list[str]:
    options = {
        "model.name_or_path": folder / "base",
        "model.dtype": "float32",
        "peft.r": 2,
        "data.train": folder / "chats.jsonl",
        "data.max_length": 32,
        "training.output_dir": folder / output,
        "training.max_steps": 1,
        "logging.progress": False,
        "logging.tensorboard": False,
    }
    return ["train", *(f"--{name}={value}" for name, value in options.items()), *more]


LOFTQ = ("--model.quantization=nf4", "--peft.init_lora_weights=loftq")
COMMANDS = {
    "train": lambda folder: train(folder, "again"),
    "train from LoftQ": lambda folder: train(folder, "loftq", *LOFTQ),
    "train on": lambda folder: train(folder, "on", f"--peft.init_from={folder / 'out' / 'adapter'}"),
    "evaluate": lambda folder: [
        *("evaluate", "--model", folder / "base", "--adapter", folder / "out/adapter"),
        *("--data", folder / "chats.jsonl", "--max-length", 32, "--output", folder / "evaluation"),
    ],
    "generate": lambda folder: [
        *("generate", "--model", folder / "base", "--adapter", folder / "out/adapter", "--raw"),
        *("--prompt", "a b", "--max-new-tokens", 2),
    ],
    "plan": lambda folder: ["plan", "--topology", "cpu", "--estimate", *train(folder, "planned")[1:]],
    "export --merge": lambda folder: ["export", folder / "out/adapter", "--merge", "--output", folder / "merged"],
    "export --portable": lambda folder: ["export", folder / "out/adapter", "--portable", "--output", folder / "plain"],
    "benchmark generate": lambda folder: [
        *("benchmark", "generate", "--model", folder / "base", "--adapter", folder / "out/adapter"),
        *("--prompt", 4, "--new-tokens", 2, "--rounds", 1),
    ],
}
WITHOUT_ADAPTER = ("train", "train from LoftQ", "plan")


@pytest.mark.parametrize("command", COMMANDS)
def test_the_checkpoint_is_opened_once(command, inputs, monkeypatch, capfd):
    argv = list(map(str, COMMANDS[command](inputs)))
    with counted(monkeypatch) as found:
        assert main(argv) == 0, capfd.readouterr().err
    expected = {"resolve base": 1} | ({} if command in WITHOUT_ADAPTER else {"resolve adapter": 1})
    assert {name: number for name, number in found.items() if name.startswith("resolve")} == expected
    assert found[str(inputs / "base" / "config.json")] == 1
    adapter_config = str(inputs / "out" / "adapter" / "adapter_config.json")
    assert found[adapter_config] == (0 if command in WITHOUT_ADAPTER else 1)
