"""Whether a long run holds on to memory, files or threads, or compiles again: a small run on the built-in demo.

    python scripts/long_run.py --steps 2000

Trains with an evaluation and a checkpoint every 50 steps, and tells every so many steps of this process its
resident memory, the bytes of live JAX arrays, open files, threads, and programs compiled so far. Ends with
status 1 where any of them goes on growing after the warm-up, the first fifth of the steps. Runs on Linux.
"""

import argparse
import gc
import os
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax

from phi3_jax.config.run import RunConfig
from phi3_jax.demo.run import demo_config
from phi3_jax.training.job import load_job
from phi3_jax.training.trainer import Trainer

# What may be gained after the warm-up: allocators keep pages, lines of metrics are kept for the report, and
# pools start their threads when they first need them.
SLACK = {"resident": 24 * 2**20, "arrays": 0, "files": 0, "threads": 2, "compilations": 0}


class Compilations:
    """Counts the programs that XLA compiled, also those that were found in the cache."""

    def __init__(self) -> None:
        self.count = 0
        jax.monitoring.register_event_duration_secs_listener(self._listen)

    def _listen(self, event: str, duration_secs: float, **_: Any) -> None:
        self.count += event == "/jax/core/compile/backend_compile_duration"


def run_config(folder: str, steps: int, every: int) -> RunConfig:
    """Small steps of the demo's model, without packing, so that rows come in several lengths."""
    run = demo_config(folder)
    data = replace(run.data, packing=False, max_length=64)
    training = replace(
        run.training,
        max_steps=steps,
        per_device_train_batch_size=2,
        per_device_eval_batch_size=20,
        logging_steps=10,
        eval_steps=every,
        save_strategy="steps",
        save_steps=every,
        save_total_limit=2,
        eval_generations=2,
        eval_max_new_tokens=8,
    )
    return replace(run, data=data, training=training)


def measure(compilations: int) -> dict[str, int]:
    """What this process holds, by the names of `SLACK`."""
    gc.collect()
    status = Path("/proc/self/status").read_text(encoding="ascii")
    resident = next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmRSS"))
    return {
        "resident": resident,
        "arrays": sum(array.nbytes for array in jax.live_arrays()),
        "files": len(os.listdir("/proc/self/fd")),
        "threads": len(os.listdir("/proc/self/task")),
        "compilations": compilations,
    }


def watch(run: RunConfig, every: int) -> list[dict[str, int]]:
    """Trains, and returns what was measured every so many steps, once checkpoints were written."""
    counter, found = Compilations(), []

    class Watched(Trainer):
        def _after_step(self) -> None:
            super()._after_step()
            if self.progress.step % every == 0:
                if self.files.checkpoints is not None:
                    self.files.checkpoints.wait()
                jax.block_until_ready(self.state)
                found.append({"step": self.progress.step, **measure(counter.count)})
                print(line(found[-1]), flush=True)

    job = load_job(run)
    with job.devices.in_use():
        trainer = Watched(run, job)
        try:
            trainer.run_all()
        finally:
            trainer.close()
    return found


def line(row: dict[str, int]) -> str:
    return (
        f"step {row['step']:>5}  resident {row['resident'] / 2**20:8.1f} MiB  arrays {row['arrays'] / 2**20:7.2f} MiB"
        f"  files {row['files']:>3}  threads {row['threads']:>3}  compilations {row['compilations']:>3}"
    )


def verdict(rows: list[dict[str, int]], warm_up: int) -> list[str]:
    """What went on growing after step `warm_up`, in words."""
    first, *_, last = [row for row in rows if row["step"] >= warm_up]
    return [
        f"{name} grew by {last[name] - first[name]:,} from step {first['step']} to step {last['step']}"
        for name, slack in SLACK.items()
        if last[name] - first[name] > slack
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000, help="default: 2000")
    parser.add_argument("--every", type=int, default=200, help="steps between two measurements; default: 200")
    parser.add_argument("--events", type=int, default=50, help="steps between evaluations and checkpoints; default: 50")
    arguments = parser.parse_args()
    if arguments.steps < 5 * arguments.every:
        parser.error(f"{arguments.steps} steps are too few to measure every {arguments.every}; give at least 5 times")
    if arguments.every % arguments.events:  # what a checkpoint was made of lives a little longer than it
        parser.error(f"--every {arguments.every} is no multiple of --events {arguments.events}; make it one")
    with tempfile.TemporaryDirectory() as folder:
        rows = watch(run_config(folder, arguments.steps, arguments.events), arguments.every)
    grown = verdict(rows, arguments.steps // 5)
    print("flat: nothing grew after the warm-up" if not grown else "NOT FLAT: " + "; ".join(grown))
    return 1 if grown else 0


if __name__ == "__main__":
    sys.exit(main())
