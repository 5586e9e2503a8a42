"""Where an evaluation keeps what it has found: a line for every row as it comes, and what it was asked to do."""

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import yaml

from phi3_jax.data.rows import TokenizedRows
from phi3_jax.parallel.distributed import is_main
from phi3_jax.system import manifest
from phi3_jax.system.errors import InputError
from phi3_jax.system.files import append_line, check_writable, storing
from phi3_jax.system.lock import check_not_held
from phi3_jax.system.numbers import is_whole
from phi3_jax.system.reading import read_yaml
from phi3_jax.system.text import first_line

_PIECE = 2**16  # bytes that a fingerprint takes at a time


@dataclass(frozen=True)
class Prediction:
    """What a model made of a row.

    Attributes:
        id: The row's number in the data, from 0.
        prompt: What the model was given, special tokens included; None where the row has no assistant turn.
        reference: The last assistant turn of the data.
        answer: The model's; None where no metric needs answers.
        finish_reason: Why it ended, see `phi3_jax.generation.text.Answer`.
        scores: The row's own, by metric.
    """

    id: int
    prompt: str | None
    reference: str
    answer: str | None
    finish_reason: str | None
    scores: dict[str, float]


def _of_line(line: bytes) -> Prediction:
    """A line of the file. Raises `ValueError`, `TypeError` or `RecursionError` for what `append` does not write."""
    found = Prediction(**json.loads(line))
    texts = (found.prompt, found.answer, found.finish_reason)
    if not is_whole(found.id) or not isinstance(found.reference, str) or not isinstance(found.scores, dict):
        raise ValueError("id is no whole number, reference no text or scores no object")
    if not all(text is None or isinstance(text, str) for text in texts):
        raise ValueError("prompt, answer or finish_reason is neither text nor null")
    if not all(isinstance(score, int | float) and math.isfinite(score) for score in found.scores.values()):
        raise ValueError("a score is no finite number")
    return found


class PredictionFile:
    """`predictions/<name>.jsonl`: opened with the lines that an earlier call has left, and appended to.

    A last line that was cut off is left out, and overwritten.

    Args:
        path: The file.
        rows: How many rows there are to predict.

    Attributes:
        found: The predictions of an earlier call, by row.

    Raises:
        InputError: The file holds anything else than predictions.
    """

    def __init__(self, path: Path, rows: int) -> None:
        self._path = path
        self.found: dict[int, Prediction] = {}
        self._end = 0  # of the last whole line
        if path.is_file():
            for prediction, end in self._read():
                if not 0 <= prediction.id < rows:
                    raise InputError(f"{path}: has a row {prediction.id}, but there are {rows}; remove the file")
                self.found[prediction.id], self._end = prediction, end

    def _read(self) -> Iterator[tuple[Prediction, int]]:
        end = 0
        with self._path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if not line.endswith(b"\n"):
                    return
                end += len(line)
                try:
                    yield _of_line(line), end
                except (ValueError, TypeError, RecursionError) as error:
                    raise InputError(
                        f"{self._path}, line {number}: is no prediction ({first_line(error)}); remove the file"
                    ) from error

    def open(self) -> None:
        """Makes the file ready to be appended to."""
        with storing(self._path):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._path.open("ab", buffering=0)
            self._file.truncate(self._end)

    def append(self, prediction: Prediction) -> None:
        """Adds a line."""
        # A lone surrogate, which a cut-off answer can hold, is escaped as all that is not ASCII is.
        append_line(self._file, self._path, json.dumps(asdict(prediction)))

    def close(self) -> None:
        """The end of what `open` began."""
        self._file.close()


# Settings that do not change what is found, but for the last bits of sums; and names of what has a fingerprint.
FREE = ("parallel", "batch_size", "name_or_path", "train")


def check_folder(folder: Path, settings: Mapping[str, object]) -> None:
    """Looks whether an evaluation may be written to the folder, or continued in it.

    It may be continued where all settings are the same; models may come and go.

    Raises:
        InputError: The folder cannot be one, or holds something else.
    """
    check_writable("output_dir", folder)
    if is_main():
        check_not_held(folder, "output_dir")
    file = folder / "config.yaml"
    if not file.exists():
        if (folder / "predictions").exists():
            raise InputError(f"{folder}: holds predictions but no config.yaml that says of what; name another folder")
        return
    before = read_yaml(file, "name another folder")
    if not isinstance(before, dict) or not isinstance(before.get("models"), dict):
        raise InputError(f"{folder}: holds another kind of run (config.yaml); name another folder")
    asked = json.loads(json.dumps(settings))
    then, now = _flat(before), _flat(asked)
    for name in (*before["models"], *asked["models"]):
        if name not in before["models"] or name not in asked["models"]:
            then, now = ({k: v for k, v in flat.items() if k[:2] != ("models", name)} for flat in (then, now))
    changed = [
        f"{'.'.join(key)} ({then.get(key)!r} then, {now.get(key)!r} now)"
        for key in sorted(then.keys() | now.keys())
        if then.get(key) != now.get(key) and not {key[0], key[-1]} & set(FREE)
    ]
    if changed:
        raise InputError(
            f"{folder}: holds an evaluation with other settings: {'; '.join(changed)}; set them back to continue it, "
            "or name another output_dir"
        )


def settings_text(settings: Mapping[str, object]) -> str:
    """What config.yaml holds, by which a later call knows whether it may continue."""
    return yaml.safe_dump(json.loads(json.dumps(settings)), sort_keys=False, allow_unicode=True)


def _flat(settings: object, path: tuple[str, ...] = ()) -> dict[tuple[str, ...], object]:
    if not isinstance(settings, dict):
        return {path: settings}
    return {key: value for name, part in settings.items() for key, value in _flat(part, (*path, str(name))).items()}


def rows_fingerprint(rows: TokenizedRows) -> str:
    """Of the rows as the model sees them: another data file, tokenizer or template has another."""
    digest = hashlib.sha256()
    for array in (rows.input_ids, rows.loss_mask, rows.offsets, rows.prompt_lengths):
        digest.update(array.tobytes())
    digest.update(json.dumps(list(rows.references)).encode())
    return digest.hexdigest()[:16]


def weights_fingerprint(folder: Path) -> str:
    """Of a checkpoint's or an adapter's configuration and weights.

    Of each file of weights its size and pieces all over it, so that no size makes this slow: training
    and merging change every row of the matrices that they change.
    """
    digest = hashlib.sha256()
    names = ("config.json", "adapter_config.json", "generation_config.json")
    files = [*folder.glob("*.safetensors"), *(path for name in names if (path := folder / name).is_file())]
    # A checkpoint of version 0.1.0 is an adapter too, and its manifest lists what it holds with hashes.
    for file in sorted(files) or [folder / manifest.NAME]:
        size = file.stat().st_size
        digest.update(f"{file.name} {size} ".encode())
        with file.open("rb") as opened:
            for start in range(0, size, max(_PIECE, size // 64)):
                opened.seek(start)
                digest.update(opened.read(_PIECE))
    return digest.hexdigest()[:16]
