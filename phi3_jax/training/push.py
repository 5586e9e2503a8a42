"""A run's adapter on the hub: uploaded while the run goes on, and at its end."""

import queue
import shutil
import tempfile
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from phi3_jax.config.hub_options import PushTarget
from phi3_jax.config.training import TrainingSection
from phi3_jax.hf.push import HubRepository, PushError, local_base, uploaded
from phi3_jax.system.errors import InputError
from phi3_jax.system.files import link_or_copy
from phi3_jax.system.text import first_line


@dataclass(frozen=True)
class _Upload:
    """A checkpoint as it was, in a folder of its own that the run does not remove."""

    step: int
    folder: Path


class RunPush:
    """Uploads for a run, with the meaning of transformers' `hub_*` settings; the first process alone has one.

    Checkpoints are uploaded by a thread that does not hold up the run, nor the process at its end.

    Args:
        training: Whose settings they are; `push_to_hub` is true.
        target: The repository.
        say: What takes lines for the console.

    Raises:
        InputError: As `HubRepository.open`: what would fail at the end of a long run fails here.
    """

    def __init__(self, training: TrainingSection, target: PushTarget, say: Callable[[str], None]):
        from huggingface_hub.utils.tqdm import disable_progress_bars

        disable_progress_bars()  # which would write over the run's own
        self._training, self._say = training, say
        self._folder = Path(training.output_dir)
        self._repository = HubRepository.open(target)
        self._waiting: queue.Queue[_Upload] = queue.Queue()
        self._thread: threading.Thread | None = None
        say(f"the adapter will be uploaded to {self._repository.url}")

    def checkpoint(self, folder: Path) -> None:
        """Starts uploading a checkpoint, as `hub_strategy` says; what goes wrong is said, and the run goes on."""
        step, training = int(folder.name), self._training
        if training.hub_strategy == "end":
            return
        if self._waiting.unfinished_tasks and not training.hub_always_push:
            self._say(
                f"the checkpoint of step {step} is not uploaded, since the upload before is still going on "
                "(training.hub_always_push uploads each)"
            )
            return
        try:
            copy = Path(tempfile.mkdtemp(dir=self._folder, prefix=".pushing-")) / str(step)
            shutil.copytree(folder, copy, copy_function=link_or_copy)
        except OSError as error:
            self._say(f"warning: the checkpoint of step {step} is not uploaded ({first_line(error)})")
            return
        self._waiting.put(_Upload(step, copy))
        if self._thread is None:  # one, so that commits come in order
            self._thread = threading.Thread(target=self._upload_all, daemon=True)
            self._thread.start()

    def _upload_all(self) -> None:
        while True:
            self._upload(self._waiting.get())

    def _upload(self, upload: _Upload) -> None:
        message = f"Training in progress, step {upload.step}"
        try:
            if uploaded(upload.folder):  # of full fine-tuning a checkpoint holds no model
                self._repository.upload(upload.folder, message)
            names = {"checkpoint": "last-checkpoint", "all_checkpoints": f"checkpoint-{upload.step}"}
            if (to := names.get(self._training.hub_strategy)) is not None:
                self._repository.upload(upload.folder, f"{message}, checkpoint", to=to, everything=True)
        except InputError as error:
            self._say(f"warning: the checkpoint of step {upload.step} could not be uploaded: {error}; the run goes on")
        finally:
            shutil.rmtree(upload.folder.parent, ignore_errors=True)
            self._waiting.task_done()

    def finish(self, folder: Path) -> None:
        """Uploads the weights in `folder`, once what is being uploaded is there.

        Raises:
            PushError: Where it fails, with the command to try again.
        """
        if self._waiting.unfinished_tasks:
            self._say("waiting for the upload of the last checkpoint")
        self._waiting.join()
        self._say(f"uploading {folder}")
        try:
            self._repository.upload(folder, "End of training")
        except InputError as error:
            raise PushError(
                f"the run is complete, but {folder} could not be uploaded: {error}; try again with: "
                f"{self._repository.command(folder)}"
            ) from error
        if (note := local_base(folder)) is not None:
            self._say(note)
        self._say(f"uploaded {folder} to {self._repository.url}")
