"""What JAX's profiler records of a run: the steps of `logging.profile`, and the memory in use."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import jax

from phi3_jax.parallel.distributed import is_main
from phi3_jax.system.text import counted

FOLDER = "profile"
MEMORY_FILE = "memory.prof"


class StepProfiler:
    """Records some steps of a run; every host writes what it saw itself.

    A profile is no part of the result: what keeps it from being written is said, and the run goes on.

    Args:
        steps: Which ones, counted from 1; None for none.
        output_dir: The run's.
        say: What takes lines for the console.
    """

    def __init__(self, steps: range | None, output_dir: Path, say: Callable[[str], None]):
        self.folder = profile_folder(output_dir)
        self._steps, self._say = steps, say
        self._since: int | None = None  # the first step of the profile that is being recorded

    def go_on_from(self, step: int) -> None:
        """Learns that the run goes on from a checkpoint, and says which steps are over."""
        if self._steps is None or step < self._steps.start:
            return
        asked = f"logging.profile {self._steps.start}:{self._steps.stop}"
        left = range(step + 1, self._steps.stop)
        if left:
            self._say(f"{asked} begins at step {left.start}: the run goes on from step {step}")
        else:
            self._say(f"not used: {asked}, since the run goes on from step {step}, and those steps are over")
        self._steps = left or None

    def step(self, number: int) -> AbstractContextManager[object]:
        """Within it step `number` is given to the device; begins to record where that is due."""
        if self._steps is not None and self._since is None and number == self._steps.start:
            self._start(number)
        return jax.profiler.StepTraceAnnotation("train", step_num=number)

    def is_last(self, number: int) -> bool:
        """Whether what is recorded ends with this step: to be told by `finish`, once the device has done it."""
        return self._since is not None and self._steps is not None and number == self._steps.stop - 1

    def finish(self, number: int) -> None:
        """Writes what was recorded up to step `number`, and the memory in use now."""
        if self._since is None:
            return
        first, self._since, self._steps = self._since, None, None
        try:
            jax.profiler.stop_trace()
            memory = write_memory(self.folder)
        except Exception as error:  # of a disk, of the device's own profiler
            self._say(f"warning: the profile of steps {first} to {number} is not whole ({_reason(error)})")
            return
        self._say(
            f"wrote a profile of {counted(number + 1 - first, 'step')} ({first} to {number}) to {self.folder}, and the "
            f"memory in use to {memory}; docs/accelerators.md says how to read them"
        )

    def close(self, number: int) -> None:
        """Ends where the run does, after step `number`, and says which steps never came."""
        if self._since is not None:
            self._say(f"warning: the run ended at step {number}, within logging.profile")
            self.finish(number)
        elif self._steps is not None and number:
            asked = f"{self._steps.start}:{self._steps.stop}"
            self._say(f"warning: the run ended at step {number}, before the steps of logging.profile {asked}")
        self._steps = None

    def _start(self, number: int) -> None:
        options = jax.profiler.ProfileOptions()
        options.python_tracer_level = 0  # each call of a Python function, which takes longer than a step
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            jax.profiler.start_trace(self.folder, profiler_options=options)
        except Exception as error:  # of a disk, or that somebody else is recording
            assert self._steps is not None
            asked = f"{self._steps.start}:{self._steps.stop}"
            self._say(f"warning: logging.profile {asked} is not recorded ({_reason(error)})")
            self._steps = None
            return
        self._since = number


def profile_folder(output_dir: Path) -> Path:
    """Where this host writes: of several each has a folder of its own, since their names may be the same."""
    folder = output_dir / FOLDER
    return folder if jax.process_count() == 1 else folder / f"host-{jax.process_index()}"


def write_memory(folder: Path) -> Path:
    """Writes which arrays lie in this host's devices' memory, and what made them, in pprof's format."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / MEMORY_FILE
    jax.profiler.save_device_memory_profile(str(path))
    return path


def tell_of_memory(output_dir: Path, say: Callable[[str], None]) -> None:
    """Writes what lies in memory after a run found none left, and says where."""
    try:
        path = write_memory(profile_folder(output_dir))
    except Exception as error:  # the first error is the one to tell of
        say(f"warning: what is in the device's memory could not be written ({_reason(error)})")
        return
    if is_main():
        say(f"warning: out of memory; {path} has what was in it (docs/accelerators.md)")


def _reason(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
