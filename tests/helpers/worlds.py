"""What the tables of malformed inputs share: whole files to damage, the commands, and what a refusal is."""

import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
from safetensors.numpy import load_file, save_file

from phi3_jax.cli import main
from phi3_jax.config.lora import LoraConfig
from phi3_jax.hf.checkpoint import Checkpoint
from phi3_jax.lora import init_lora
from phi3_jax.peft.save import save_adapter
from tests.helpers.checkpoints import write_checkpoint
from tests.helpers.commands import after_device
from tests.helpers.rows import write_chats

INDEX, CONFIG, WEIGHTS = "model.safetensors.index.json", "config.json", "model.safetensors"
ADAPTER, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


@dataclass(frozen=True)
class World:
    """**Fields**: `base`, `adapter` and `chats`, which a test may damage; `out`, where nothing may come to lie."""

    root: Path

    @property
    def base(self) -> Path:
        return self.root / "base"

    @property
    def adapter(self) -> Path:
        return self.root / "adapter"

    @property
    def chats(self) -> Path:
        return self.root / "chats.jsonl"

    @property
    def out(self) -> Path:
        return self.root / "out"

    def argv(self, command: str, *more: str) -> list[str]:
        """A command that reads all three, or those of them that it takes."""
        base, adapter, chats, out = map(str, (self.base, self.adapter, self.chats, self.out))
        model = ["--model", base]
        run = [f"--model.name_or_path={base}", f"--data.train={chats}", f"--training.output_dir={out}"]
        run += [
            "--model.dtype=float32",
            "--data.max_length=32",
            "--training.max_steps=1",
            "--logging.tensorboard=false",
        ]
        commands = {
            "info": ["info", base],
            "info adapter": ["info", adapter],
            "train": ["train", *run],
            "train on": ["train", *run, f"--peft.init_from={adapter}"],
            "evaluate": ["evaluate", *model, "--data", chats, "--max-length", "32", "--output_dir", out],
            "evaluate adapter": ["evaluate", *model, "--adapter", adapter, "--data", chats, "--output_dir", out],
            "generate": ["generate", *model, "--prompt", "ab", "--output", f"{out}.txt"],
            "generate adapter": ["generate", *model, "--adapter", adapter, "--prompt", "ab", "--output", f"{out}.txt"],
            "chat": ["chat", *model],
            "chat adapter": ["chat", *model, "--adapter", adapter],
            "export": ["export", adapter, "--merge", "--base", base, "--output", out],
            "portable": ["export", adapter, "--portable", "--base", base, "--output", out],
            "plan": ["plan", "--topology", "cpu", "--estimate", *run],
            "benchmark train": ["benchmark", "train", f"--model.name_or_path={base}", "--json"],
            "benchmark": ["benchmark", "generate", *model, "--json"],
            "benchmark adapter": ["benchmark", "generate", *model, "--adapter", adapter, "--json"],
            "lm-eval": ["lm-eval", *model, "--tasks", "none_such", "--output_path", out],
        }
        return [*commands[command], *more]


def write_world(root: Path) -> World:
    world = World(root)
    write_checkpoint(world.base)
    (world.base / "generation_config.json").write_text('{"eos_token_id": 2}')
    lora = init_lora(Checkpoint.open(world.base).load_model(dtype="float32"), LoraConfig(r=2), jax.random.key(0))
    save_adapter(world.adapter, lora, base_model_name_or_path=str(world.base))
    write_chats(world.chats)
    return world


def refusal(argv: list[str], capfd, root: Path) -> str:
    """The one line of a command that is refused: status 2, nothing else said but on which device, nothing left behind
    in `root`."""
    before = contents(root)
    capfd.readouterr()
    assert main(argv) == 2
    captured = capfd.readouterr()
    assert after_device(captured.out) == ""
    (line,) = after_device(captured.err).splitlines()
    assert line.startswith("phi3-jax: ")
    assert len(line) < 5000
    assert line.isprintable()
    assert contents(root) == before
    return line


def contents(root: Path) -> dict[str, bytes | None]:
    """Every file below, with what it holds; None for what is no file."""
    return {
        str(path.relative_to(root)): path.read_bytes() if path.is_file() and not path.is_symlink() else None
        for path in root.rglob("*")
    }


# Damage, to a file by its name within a folder.

Damage = Callable[[Path], None]


def text(name: str, content: str | bytes) -> Damage:
    """The file holds this instead."""
    data = content.encode() if isinstance(content, str) else content
    return lambda folder: void((folder / name).write_bytes(data))


def entries(name: str, **changes: object) -> Damage:
    """The JSON object has these entries instead; an entry of `...` is taken out."""

    def damage(folder: Path) -> None:
        raw = json.loads((folder / name).read_text()) if (folder / name).exists() else {}
        raw |= changes
        (folder / name).write_text(json.dumps({key: value for key, value in raw.items() if value is not ...}))

    return damage


def literal(name: str, key: str, value: str) -> Damage:
    """The JSON object begins with this entry, as it is written."""
    return lambda folder: void(
        (folder / name).write_text(f'{{"{key}": {value}, ' + (folder / name).read_text().lstrip("{ \n"))
    )


def cut(name: str, size: int) -> Damage:
    return lambda folder: void((folder / name).write_bytes((folder / name).read_bytes()[:size]))


def gone(name: str) -> Damage:
    return lambda folder: (folder / name).unlink()


def linked(name: str, target: str) -> Damage:
    """A link to `target`, in a file's place."""

    def damage(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(target)

    return damage


def moved_out(name: str) -> Damage:
    """The file lies beside the folder, and a link to it within."""

    def damage(folder: Path) -> None:
        shutil.move(folder / name, folder.parent / "elsewhere")
        (folder / name).symlink_to(folder.parent / "elsewhere")

    return damage


def pipe(name: str) -> Damage:
    def damage(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        os.mkfifo(folder / name)

    return damage


def directory(name: str) -> Damage:
    def damage(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        (folder / name).mkdir()

    return damage


def header(name: str, change: Callable[[dict], object], *, length: int | None = None) -> Damage:
    """The safetensors header is changed, in place or by what `change` returns; `length`, the number before it."""

    def damage(folder: Path) -> None:
        content = (folder / name).read_bytes()
        end = 8 + int.from_bytes(content[:8], "little")
        raw = json.loads(content[8:end])
        raw = change(raw) or raw
        encoded = raw if isinstance(raw, bytes) else json.dumps(raw).encode()
        size = len(encoded) if length is None else length
        (folder / name).write_bytes(size.to_bytes(8, "little") + encoded + content[end:])

    return damage


def first(change: dict) -> Callable[[dict], None]:
    """A header whose first tensor has these fields."""

    def apply(raw: dict) -> None:
        next(fields for name, fields in raw.items() if name != "__metadata__").update(change)

    return apply


def tensors(name: str, change: Callable[[dict[str, np.ndarray]], object]) -> Damage:
    def damage(folder: Path) -> None:
        arrays = load_file(folder / name)
        change(arrays)
        save_file(arrays, folder / name)

    return damage


def index(weight_map: object) -> Damage:
    """The one file of weights becomes one that an index speaks of; `weight_map`, for all its tensors or whole."""

    def damage(folder: Path) -> None:
        (folder / WEIGHTS).rename(folder / "model-00001-of-00001.safetensors")
        names = load_file(folder / "model-00001-of-00001.safetensors")
        places = dict.fromkeys(names, weight_map) if isinstance(weight_map, str) else weight_map
        (folder / INDEX).write_text(json.dumps({"weight_map": places}))

    return damage


def both(*damages: Damage) -> Damage:
    def damage(folder: Path) -> None:
        for part in damages:
            part(folder)

    return damage


def void(_: object) -> None:
    """For what a file's method returns."""


def words_missing(line: str, words: str) -> list[str]:
    """Those of the words, parted by ` | `, that the line does not have."""
    return [word for word in words.split(" | ") if not re.search(re.escape(word), line)]
