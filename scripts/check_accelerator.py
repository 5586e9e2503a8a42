"""Checks what this machine's TPU or GPU computes, and how fast, in ten minutes; nothing is downloaded.

    python scripts/check_accelerator.py                          # all of it; results in out/accelerator
    python scripts/check_accelerator.py --stages attention model # some of it
    python scripts/check_accelerator.py --small                  # on a CPU: the script itself

- `device`: what it is, and what plain programs reach of its peaks.
- `attention`: every kernel for this device against scores in float32 on the CPU, packed and windowed.
- `reference`, `model`: logits, gradients and ten steps against the CPU's, in float32 and bfloat16, NF4's logits too.
- `train`, `train QLoRA`, `train twice as long`, `decode`, `decode 16`: tokens a second, shares of the peaks, memory
  beside what `phi3-jax plan` says, for Phi-3-mini at full size with random weights.
- `PEFT`, `PEFT compiled`, `transformers decode`, `transformers decode 16`: the same work by others, where they are
  installed.

Each stage runs in a process of its own for so many seconds at most; what one finds, or what breaks it, is written to
check.json and check.md before the next one begins. Status 0 if all is right, 1 if anything is wrong, failed or not
reached, 2 for wrong options.
"""

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

import jax
from accelerator_check import peers
from accelerator_check.record import TABLE_FILE, Recorder, StageResult, read_findings, table, write_results
from accelerator_check.sizes import FULL, SMALL
from accelerator_check.stages import STAGES, Workplace, stage_named

NAMES = tuple(stage.name for stage in STAGES)
MINUTES = 10.0  # what the stages' own limits are for


def arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--output", type=Path, default=Path("out/accelerator"), help="default: %(default)s")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="for all stages together (default: %(default)g)")
    parser.add_argument("--small", action="store_true", help="at a small size, to try the script on a CPU")
    parser.add_argument("--stages", nargs="+", choices=NAMES, default=list(NAMES), help="default: all")
    parser.add_argument("--stage", choices=NAMES, help=argparse.SUPPRESS)  # what a stage's process is told
    options = parser.parse_args(given)
    if not options.minutes > 0:
        parser.error(f"--minutes is {options.minutes}, expected more than 0")
    return options


def main() -> int:
    options = arguments()
    if options.stage is not None:
        return work(options)
    options.output.mkdir(parents=True, exist_ok=True)
    results = run_stages(options)
    print(table(results))
    print(f"written to {options.output / TABLE_FILE}")
    return 0 if all(result.is_right for result in results) else 1


def work(options: argparse.Namespace) -> int:
    """What a stage's own process does; 3 says that it is not for this machine."""
    stage, recorder = stage_named(options.stage), Recorder(findings_file(options.output, options.stage))
    reason = peers.why_not(jax.default_backend()) if stage.is_peer else None
    if reason is not None:
        recorder.note("left out", reason)
        return 3
    stage.work(Workplace(SMALL if options.small else FULL, options.output, recorder))
    return 0


def run_stages(options: argparse.Namespace) -> list[StageResult]:
    """Runs them one after another, and writes all there is after each."""
    start, results = time.monotonic(), list[StageResult]()
    about = {
        "command": " ".join(["python", "scripts/check_accelerator.py", *sys.argv[1:]]),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "small": options.small,
    }
    for name in (name for name in NAMES if name in options.stages):
        left = 60 * options.minutes - (time.monotonic() - start)
        print(f"{name} ...", flush=True)
        results.append(run_stage(options, name, left))
        print(f"{name}: {results[-1].status} after {results[-1].seconds:.0f} s {results[-1].reason}", flush=True)
        write_results(options.output, about, results)
    return results


def run_stage(options: argparse.Namespace, name: str, left: float) -> StageResult:
    """One stage in a process of its own, `left` seconds at most: a crash, or a compiler that hangs, ends it alone."""
    file = findings_file(options.output, name)
    file.unlink(missing_ok=True)
    seconds = min(stage_named(name).seconds * options.minutes / MINUTES, left)
    if seconds < 1:
        return StageResult(name, "out of time", 0, [], "not begun: --minutes are over")
    command = [sys.executable, __file__, "--stage", name, "--output", str(options.output)]
    start = time.monotonic()
    log = options.output / f"{_slug(name)}.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*command, *["--small"] * options.small],
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # with all that it starts itself, such as compilers
            env=environment(options.output, name),
        )
        try:
            status = process.wait(seconds)
        except subprocess.TimeoutExpired:
            end(process)
            took = time.monotonic() - start
            return StageResult(name, "out of time", took, read_findings(file), f"stopped after {seconds:.0f} s")
        except BaseException:  # such as control and C: nothing is left behind
            end(process)
            raise
    took, found = time.monotonic() - start, read_findings(file)
    if status == 3:
        return StageResult(name, "left out", took, [], found[-1].note if found else "")
    if status != 0:
        return StageResult(name, "failed", took, found, f"{last_line(log)} (status {status}, {log})")
    wrong = [one.name for one in found if not one.is_right]
    return StageResult(name, "wrong" if wrong else "done", took, found, "; ".join(wrong[:3]))


def end(process: subprocess.Popen[bytes]) -> None:
    """Ends a stage's process and all that it has started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def environment(folder: Path, name: str) -> dict[str, str]:
    """A stage's: it finds the package and these files, keeps what it compiles, and the CPU where it needs that."""
    here = Path(__file__).resolve().parent
    paths = [str(here), str(here.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    changed = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    changed.setdefault("JAX_COMPILATION_CACHE_DIR", str(folder / "compiled"))
    asked = changed.get("JAX_PLATFORMS", "")
    if stage_named(name).on_cpu:
        changed["JAX_PLATFORMS"] = "cpu"
    elif asked and "cpu" not in asked.split(","):
        changed["JAX_PLATFORMS"] = f"{asked},cpu"  # what kernels are compared with
    if stage_named(name).is_peer:
        changed["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # PyTorch is to have the card
    return changed


def findings_file(folder: Path, name: str) -> Path:
    """Where a stage writes line by line."""
    return folder / f"{_slug(name)}.jsonl"


def last_line(log: Path) -> str:
    """What a process said last that is not empty."""
    lines = log.read_text(encoding="utf-8", errors="replace").split("\n")
    return next((json.dumps(line.strip())[1:-1][:300] for line in reversed(lines) if line.strip()), "it said nothing")


def _slug(name: str) -> str:
    return name.lower().replace(" ", "_")


if __name__ == "__main__":
    sys.exit(main())
