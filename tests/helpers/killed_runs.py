"""Kills runs at chosen points, for test_kills.py: every run is a process forked from this one.

    python -m tests.helpers.killed_runs FOLDER NAME ...

Writes FOLDER/whole, a run that nothing disturbed, and for each NAME of `POINTS` a run that was killed
there and resumed.
"""

import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(sys.argv[1]) / "compiled"))
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "true"  # as in tests/conftest.py

import transformers

from phi3_jax.peft import save
from phi3_jax.system import files, manifest
from phi3_jax.training import checkpoints, loop, metrics, results
from tests.helpers.runs import SETTINGS, run_config, write_inputs


def die(*_: Any, **__: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def at_call(module: Any, name: str, number: int) -> Callable[[], None]:
    """Has the process killed in place of the call of that number, from 1."""

    def prepare() -> None:
        function, calls = getattr(module, name), []

        def call(*arguments: Any, **options: Any) -> Any:
            calls.append(1)
            return (die if len(calls) == number else function)(*arguments, **options)

        setattr(module, name, call)

    return prepare


def in_line(number: int) -> Callable[[], None]:
    """Has the process killed while it writes that line of metrics.jsonl, after half of it."""

    def prepare() -> None:
        write = metrics.MetricsLog.write

        def write_half(self: Any, row: dict[str, Any]) -> None:
            if len(self.history) == number:
                self._file.write(b'{"step": 3, "lo')
                die()
            write(self, row)

        metrics.MetricsLog.write = write_half

    return prepare


# Where each run is killed: the first attempt, the one that resumes it, and so on.
POINTS = {
    "four": [
        at_call(checkpoints, "write_manifest", 2),  # the second checkpoint's arrays are whole, their list is missing
        at_call(files.os, "replace", 2),  # metrics.jsonl is about to be cut to the checkpoint; after config.yaml
        at_call(results, "write_report", 1),  # the adapter is there, the report is not
        at_call(save.os, "replace", 5),  # half of the adapter's files are in the place of those before
    ],
    "sealed": [at_call(manifest, "_write", 2)],
    "removal": [at_call(checkpoints.shutil, "rmtree", 1)],  # the third checkpoint is there, the first not yet gone
    "line": [in_line(2), in_line(3)],
    "adapter": [at_call(save, "_move", 1)],
}


def apart(action: Callable[[], Any]) -> int:
    """Does it in a process of its own, since one that has used JAX cannot be forked; the exit status, negative
    where that was killed."""
    pid = os.fork()
    if pid:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    status = 1
    try:
        action()
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(status)


def attempt(inputs: Path, output: str, prepare: Callable[[], None] | None) -> int:
    def run() -> None:
        if prepare is not None:
            prepare()
        settings = {**SETTINGS, "save_total_limit": 2, "eval_generations": 0, "resume_from_checkpoint": True}
        loop.train(run_config(inputs, output, data={"packing": True}, training=settings))

    return apart(run)


def main() -> None:
    folder = Path(sys.argv[1])
    _ = transformers.AutoTokenizer  # imported here once, with all that it brings along
    assert apart(lambda: write_inputs(folder)) == 0
    assert attempt(folder, "whole", None) == 0
    for name in sys.argv[2:]:
        for point in POINTS[name]:
            status = attempt(folder, name, point)
            assert status == -signal.SIGKILL, (name, status)
        assert attempt(folder, name, None) == 0


if __name__ == "__main__":
    main()
