"""The base model of adapters: the one that is given, or the one that they name, at the revision that they name."""

from collections.abc import Collection, Sequence
from pathlib import Path

from phi3_jax.config.hub_options import Hub
from phi3_jax.hf.checkpoint import Checkpoint
from phi3_jax.hf.hub import CHECKPOINT_FILES
from phi3_jax.peft.adapter import PeftAdapter
from phi3_jax.peft.config import CONFIG_FILE
from phi3_jax.peft.tokenizer import BaseOfAdapters
from phi3_jax.system.errors import InputError
from phi3_jax.system.reading import local_path
from phi3_jax.system.telling import tell


def open_base(
    model: str | Path | None,
    adapters: Collection[PeftAdapter],
    hub: Hub | None = None,
    *,
    patterns: Sequence[str] = CHECKPOINT_FILES,
) -> BaseOfAdapters:
    """Opens the checkpoint that the adapters are for; a line on standard error says what of that they said.

    Its tokenizer is the one that they were trained with.

    Args:
        model: Folder or hub id; None for the one that the adapters' files name.
        adapters: What is going to be loaded beside it.
        hub: How the hub is asked; where it says no revision, that which the adapters were trained on is taken.
        patterns: Of the files to download.

    Raises:
        InputError: Where no adapter names a base, where they disagree on it or on its revision, and as
            `Checkpoint.open`.
    """
    hub = hub or Hub()
    name = _agreed(adapters) if model is None else str(model)
    revision = hub.revision
    if revision is None and not local_path(name).is_dir():
        revision = _revision(name, adapters)
    opened = Checkpoint.open(name, hub.at(revision), patterns=patterns)
    if model is None or revision != hub.revision:
        where = "" if revision is None else f" at revision {revision}"
        who = " and ".join(adapter.name for adapter in adapters if adapter.base == name)
        tell(f"base: {name}{where}, which {who} was trained on")
    return BaseOfAdapters(opened.name, opened.folder, opened.hub, tuple(adapters))


def _agreed(adapters: Collection[PeftAdapter]) -> str:
    """The base that the adapters name."""
    names = list(dict.fromkeys(adapter.base for adapter in adapters if adapter.base))
    if not adapters:
        raise InputError("no model is given, and no adapter that names one; give one with --model")
    if not names:
        files = ", ".join(str(adapter.folder / CONFIG_FILE) for adapter in adapters)
        raise InputError(f"{files}: names no base model; give it with --model")
    if len(names) > 1:
        raise InputError(f"the adapters name different base models, {' and '.join(names)}; give one with --model")
    return names[0]


def _revision(name: str, adapters: Collection[PeftAdapter]) -> str | None:
    """The revision of the base of that name that its adapters were trained on."""
    found = list(dict.fromkeys(adapter.revision for adapter in adapters if adapter.base == name))
    if len(found) > 1:
        revisions = " and ".join(revision or "main" for revision in found)
        raise InputError(f"the adapters name different revisions of {name}, {revisions}; give one with --revision")
    return found[0] if found else None
