"""The weight files of a checkpoint folder: found, their headers read, and held against its configuration."""

import logging
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from phi3_jax.config.model import Phi3Config
from phi3_jax.hf.bnb import BnbConfig, expected_tensors
from phi3_jax.hf.layout import EMBEDDING, HEAD, Expected, checkpoint_layout
from phi3_jax.hf.safetensors_io import TensorEntry, read_header
from phi3_jax.system.errors import InputError
from phi3_jax.system.reading import read_json

logger = logging.getLogger(__name__)

CONFIG = "config.json"
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
# Tables that transformers before 4.31 stored and nobody reads: they follow from config.json.
HARMLESS = re.compile(r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq")


@dataclass(frozen=True)
class Weights:
    """What the files of a checkpoint hold, by name, and all that is wrong with that, one kind a string."""

    files: tuple[Path, ...]
    tensors: Mapping[str, TensorEntry]
    problems: tuple[str, ...]

    def raise_for_problems(self, folder: Path) -> None:
        """Tells all of them, if there are any. Raises `InputError`."""
        if self.problems:
            raise InputError(
                f"{folder}: {'; '.join(self.problems)}; give the whole checkpoint that config.json speaks of"
            )


def has_weights(folder: Path) -> bool:
    """Whether the folder has files of weights; an index alone, as in a clone without its large files, is none."""
    return any(file.suffix in (".safetensors", ".bin") for file in folder.iterdir())


def read_weights(folder: Path, config: Phi3Config, quantization: BnbConfig | None) -> Weights:
    """Reads the headers of the folder's safetensors files and holds them against its configuration.

    Raises:
        InputError: Where there are no safetensors files, or their index cannot be read; all other problems are
            returned.
    """
    index = _read_index(folder)
    files, problems = _shards(folder, index)
    tensors: dict[str, TensorEntry] = {}
    broken, doubled, misplaced = [], [], []
    readable = []
    for file in files:
        try:
            entries = read_header(file)
        except InputError as error:
            broken.append(str(error).removeprefix(f"{folder}{os.sep}"))
            continue
        readable.append(file.name)
        doubled += [name for name in entries if name in tensors]
        misplaced += [name for name in entries if index is not None and index.get(name) != file.name]
        tensors.update(entries)
    # What a lost shard should hold is not missing besides.
    lost = {name for name, file in (index or {}).items() if file not in readable}
    expected = _expected(config, quantization)
    if not readable and index is None:
        lost = set(expected)
    problems += _listed("unreadable files", broken)
    problems += _listed("tensors in two files", doubled)
    problems += _listed("tensors that the index places elsewhere or not at all", misplaced)
    phantoms = _phantoms(index or {}, expected, tensors, lost)
    problems += _listed("tensors that the index names and no file holds", phantoms)
    problems += _compare(expected, tensors, lost)
    return Weights(tuple(files), tensors, tuple(problems))


def _phantoms(
    index: Mapping[str, str], expected: Mapping[str, Expected], tensors: Mapping[str, TensorEntry], lost: set[str]
) -> list[str]:
    """Names of the index that no file holds, but those that are missing, lost or needed by nobody."""
    return [
        name
        for name in index
        if name not in tensors and name not in lost and name not in expected and not HARMLESS.fullmatch(name)
    ]


def _read_index(folder: Path) -> dict[str, str] | None:
    """The index's weight map; None for a single file, which goes first, as in transformers."""
    if (folder / SINGLE).is_file():
        return None
    path = folder / INDEX
    if not path.is_file():
        pickles = sorted(file.name for pattern in PICKLES for file in folder.glob(pattern))
        if pickles or (folder / "pytorch_model.bin.index.json").exists():
            raise InputError(
                f"{folder}: its weights are pickles ({', '.join(pickles[:3]) or 'pytorch_model.bin'}), which can run "
                "code and are never opened; convert them to safetensors"
            )
        raise InputError(f"{folder}: no weights in it; expected {SINGLE} or {INDEX}")
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise InputError(f"{path}: has no weight_map from tensor names to file names; download it again")
    return weight_map


def _shards(folder: Path, index: Mapping[str, str] | None) -> tuple[list[Path], list[str]]:
    """The files to read, and what is wrong with those that the index names."""
    if index is None:
        return [folder / SINGLE], []
    names = sorted(set(index.values()))
    # A plain name and nothing else: an index must not lead out of its folder, nor to a pickle.
    proper = [name for name in names if re.fullmatch(r"\w[\w.-]{0,200}\.safetensors", name, re.ASCII)]
    present = [name for name in proper if (folder / name).is_file()]
    problems = _listed(
        "file names in the index that are no safetensors file beside it", sorted(set(names) - set(proper))
    )
    problems += _listed("missing shards", sorted(set(proper) - set(present)))
    return [folder / name for name in present], problems


def _expected(config: Phi3Config, quantization: BnbConfig | None) -> dict[str, Expected]:
    expected: dict[str, Expected] = {}
    for entry in checkpoint_layout(config):
        if quantization is not None and quantization.stores(entry):
            expected |= expected_tensors(entry, quantization)
        else:
            expected[entry.name] = Expected(entry.shape)
    if config.tie_word_embeddings:
        expected[HEAD] = replace(expected[".".join(EMBEDDING)], optional=True)
    return expected


def _compare(expected: Mapping[str, Expected], tensors: Mapping[str, TensorEntry], lost: set[str]) -> list[str]:
    missing = [n for n, wanted in expected.items() if not (n in tensors or n in lost or wanted.optional)]
    unknown = [name for name in tensors if name not in expected]
    harmless = [name for name in unknown if HARMLESS.fullmatch(name)]
    if harmless:
        logger.info("left out, since config.json says the same: %s", _listed("tensors", harmless)[0])
    both = [(tensors[name], wanted) for name, wanted in expected.items() if name in tensors]
    shapes = [
        f"{e.name} is {list(e.shape)}, expected {'a vector' if wanted.shape is None else list(wanted.shape)}"
        for e, wanted in both
        if (len(e.shape) != 1 if wanted.shape is None else e.shape != wanted.shape)
    ]
    dtypes = [f"{e.name} is {e.dtype}, not {' or '.join(w.dtypes)}" for e, w in both if e.dtype not in w.dtypes]
    hint = "; is config.json's tie_word_embeddings to be true?" if missing == [HEAD] else ""
    return [
        *(text + hint for text in _listed("missing tensors", missing)),
        *_listed("unknown tensors", [name for name in unknown if name not in harmless]),
        *_listed("wrong shapes", shapes),
        *_listed("wrong dtypes", dtypes),
    ]


def _listed(kind: str, items: Iterable[str]) -> list[str]:
    """`["3 missing tensors (a, b, c)"]`, or nothing; bounded, and on one line whatever a file holds."""
    items = list(items)
    if not items:
        return []
    shown = [item if item.isprintable() else repr(item) for item in items[:5]]
    more = ", ..." if len(items) > 5 else ""
    return [f"{len(items)} {kind} ({', '.join(text[:300] for text in shown)}{more})"]
