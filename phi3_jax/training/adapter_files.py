"""The adapter of a run as PEFT's files: at its end, and beside the state in each of its checkpoints."""

import tempfile
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import jax
import numpy as np

from phi3_jax.config.run import RunConfig
from phi3_jax.hf.save_tokenizer import save_tokenizer
from phi3_jax.lora import Lora, combine
from phi3_jax.parallel.distributed import is_main, to_host
from phi3_jax.peft.save import AdapterFiles, save_adapter
from phi3_jax.training.job import RunJob
from phi3_jax.training.step import Params


@dataclass(frozen=True)
class Beside:
    """An adapter on its way into a checkpoint's folder.

    Attributes:
        lora: With arrays of the host, which no step changes.
        base: What the adapter names as its base.
        revision: Of that base.
        tokenizer: The files of the tokenizer, by their paths in the folder.
    """

    lora: Lora
    base: str
    revision: str | None
    tokenizer: dict[str, bytes]

    @property
    def nbytes(self) -> int:
        """About what it takes on a disk."""
        arrays: list[np.ndarray] = jax.tree.leaves(self.lora)
        return sum(array.nbytes for array in arrays) + sum(map(len, self.tokenizer.values()))

    def write(self, folder: Path) -> None:
        """Writes what `save_adapter` would."""
        for name, content in self.tokenizer.items():
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_bytes(content)
        AdapterFiles.of(self.lora, self.base, self.revision).write(folder)


class RunAdapter:
    """The adapter that a run trains, whenever it is to be written.

    Args:
        run: Its settings.
        job: What it works on.
    """

    def __init__(self, run: RunConfig, job: RunJob):
        self._run, self._job = run, job

    def save(self, folder: Path, lora: Lora) -> None:
        """Writes the adapter, with arrays of the host, and the tokenizer to a folder of their own."""
        base, revision = self._base
        save_adapter(folder, lora, tokenizer=self._job.tokenizer, base_model_name_or_path=base, revision=revision)

    def beside(self, trainable: Params) -> Beside | None:
        """A copy of the adapter as it is now, for the first process to write; None where the model itself trains.

        Every process has to take part.
        """
        if trainable["lora"] is None:
            return None
        # Apart from the model's weights, which would be converted.
        whole = to_host(combine(trainable["lora"], self._job.frozen["lora"]))
        # A CPU's arrays would be seen, not copied, and the next step writes there.
        lora: Lora = jax.tree.map(np.array, whole)
        return Beside(lora, *self._base, self._tokenizer) if is_main() else None

    @cached_property
    def _base(self) -> tuple[str, str | None]:
        """The base's name, under which PEFT looks for it from wherever it runs, and its revision."""
        peft, model = self._run.peft, self._run.model
        base = peft.base_model_name_or_path or model.name_or_path
        revision = peft.revision or (self._job.revision if base == model.name_or_path else None)
        if Path(base).is_dir():
            return str(Path(base).absolute()), None
        return base, revision

    @cached_property
    def _tokenizer(self) -> dict[str, bytes]:
        """The tokenizer's files. Made once: a tokenizer's files are large to write as text."""
        with tempfile.TemporaryDirectory() as folder:
            save_tokenizer(self._job.tokenizer, Path(folder))
            files = [path for path in Path(folder).rglob("*") if path.is_file()]
            return {str(path.relative_to(folder)): path.read_bytes() for path in files}
