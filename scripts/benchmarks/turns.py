"""Two programs that take turns at the same work, each in a process of its own for the whole comparison.

So neither's libraries disturb the other, each one's peak memory is its own, and whatever else the machine does
falls on both.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from time import perf_counter, process_time
from typing import Any


@dataclass
class Steps:
    """What a worker runs.

    Attributes:
        step: Takes one and gives its loss when it is done.
        memory: Bytes in use now.
        peak: The most since the last `reset`.
        about: Versions and the like.
    """

    step: Callable[[], float]
    memory: Callable[[], int]
    peak: Callable[[], int]
    reset: Callable[[], None]
    about: dict[str, Any]


def resident_bytes(field: str = "VmRSS") -> int:
    """Of this process; `VmHWM` is the peak (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))


def reset_resident_peak() -> None:
    """The peak starts anew at what is in use now (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")


def limit_threads(number: int) -> None:
    """To so many cores; before libraries are imported, which count them."""
    os.sched_setaffinity(0, set(sorted(os.sched_getaffinity(0))[:number]))
    os.environ["OMP_NUM_THREADS"] = str(number)


def serve(make: Callable[[], Steps]) -> None:
    """The worker's side: makes the steps, then takes as many as each line of its input says."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not get between the answers

    def answer(values: dict[str, Any]) -> None:
        print(json.dumps(values), file=answers, flush=True)

    steps = make()
    answer({"memory": steps.memory(), "about": steps.about})
    for line in sys.stdin:
        steps.reset()
        start, start_cpu = perf_counter(), process_time()
        losses = [steps.step() for _ in range(int(line))]
        seconds = {"seconds": perf_counter() - start, "cpu_seconds": process_time() - start_cpu}
        answer({**seconds, "loss": losses[-1], "peak": steps.peak()})


class Worker:
    """The other side of `serve`: `script --worker name settings` as a process."""

    def __init__(
        self,
        script: str,
        name: str,
        settings: dict[str, Any],
        environment: dict[str, str] | None = None,
        python: str = sys.executable,
    ):
        self.name = name
        self._process = subprocess.Popen(
            [python, script, "--worker", name, json.dumps(settings)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **(environment or {})},
        )
        self.start = self._answer()

    def take(self, steps: int) -> dict[str, Any]:
        """Takes the steps: `seconds` and `cpu_seconds` for all of them, `loss` of the last, `peak` bytes meanwhile."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{steps}\n")
        self._process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.name}: stopped with status {self._process.wait()}; its message is above")
        answer: dict[str, Any] = json.loads(line)
        return answer


def compare(ours: Worker, peer: Worker, *, warmup: int, steps: int, rounds: int, tokens: int) -> dict[str, Any]:
    """Lets both warm up (and compile), then take turns.

    Args:
        ours: The worker whose ratio it is.
        peer: The one that it is held against.
        warmup: Steps before the first turn.
        rounds: Turns of each.
        steps: In a turn.
        tokens: In a step.

    Returns:
        For each worker `tokens_per_second` (median over rounds), `warmup_seconds`, `peak_gb` over the timed steps,
        `above_start_gb` (that without what was in use once the model was made), `warmup_peak_gb` (compilation
        included), `loss` and `about`; and `ratio`, ours to the peer's tokens a second, the median over rounds, with the
        lowest and the highest. `cpu_ratio` is that of tokens a second of processor time: on one thread it holds on a
        busy machine, too (on several, threads that wait for each other without sleeping count as working).
    """
    workers = (ours, peer)
    first = {worker.name: worker.take(warmup) for worker in workers}
    turns: dict[str, list[dict[str, Any]]] = {worker.name: [] for worker in workers}
    for index in range(rounds):
        for worker in workers if index % 2 == 0 else reversed(workers):
            turns[worker.name].append(worker.take(steps))
    result: dict[str, Any] = {}
    for worker in workers:
        took = turns[worker.name]
        peak = max(turn["peak"] for turn in took)
        result[worker.name] = {
            "tokens_per_second": tokens * steps / median(turn["seconds"] for turn in took),
            "warmup_seconds": first[worker.name]["seconds"],
            "peak_gb": peak / 1e9,
            "cpu_seconds": median(turn["cpu_seconds"] for turn in took),
            "above_start_gb": (peak - worker.start["memory"]) / 1e9,
            "warmup_peak_gb": first[worker.name]["peak"] / 1e9,
            "loss": took[-1]["loss"],
            "about": worker.start["about"],
        }
    pairs = list(zip(turns[ours.name], turns[peer.name], strict=True))
    ratios = [theirs["seconds"] / own["seconds"] for own, theirs in pairs]
    result |= {"ratio": median(ratios), "ratio_low": min(ratios), "ratio_high": max(ratios)}
    return {**result, "cpu_ratio": median(theirs["cpu_seconds"] / own["cpu_seconds"] for own, theirs in pairs)}


def run(
    script: str,
    makers: Mapping[str, Callable[[argparse.Namespace], Steps]],
    arguments: Callable[[], argparse.Namespace],
    describe: Callable[[argparse.Namespace], tuple[str, int]],
) -> None:
    """A comparison's `main`: in a worker it serves what the worker's name stands for in `makers`, two of them,
    ours first; otherwise it starts the two, has them take turns, and prints the comparison.

    Args:
        script: The file that the workers run.
        makers: What makes each worker's steps, by its name.
        describe: What a comparison's heading says, and the tokens of a step.
        arguments: Reads the command line: `device`, `threads`, `warmup`, `steps`, `rounds`, and what the makers want;
            with `peer_python` the second one runs on another Python. `describe`, a line that says what is compared, and
            the tokens of a step.
    """
    if sys.argv[1:2] == ["--worker"]:
        name, settings = sys.argv[2], argparse.Namespace(**json.loads(sys.argv[3]))
        if settings.device == "cpu":
            limit_threads(settings.threads)
        serve(lambda: makers[name](settings))
        return
    settings = arguments()
    # Both live on one GPU: JAX would take most of it at once.
    environment = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    if settings.device == "cpu":
        environment["JAX_PLATFORMS"] = "cpu"
    pythons = (sys.executable, getattr(settings, "peer_python", sys.executable))
    ours, peer = (
        Worker(script, name, vars(settings), environment, python) for name, python in zip(makers, pythons, strict=True)
    )
    case, tokens = describe(settings)
    result = compare(ours, peer, warmup=settings.warmup, steps=settings.steps, rounds=settings.rounds, tokens=tokens)
    ours.close()
    peer.close()
    print_comparison({**result, "settings": vars(settings)}, ours.name, peer.name, case)


def print_comparison(result: dict[str, Any], ours: str, peer: str, case: str) -> None:
    """A Markdown table of one row, and the whole as one line of JSON."""
    a, b = result[ours], result[peer]
    print(f"| case | {ours}, tokens/s | {peer}, tokens/s | ratio (range) | peak, GB | above start, GB |")
    print("|---|---|---|---|---|---|")
    spread = f"{result['ratio']:.2f} ({result['ratio_low']:.2f} to {result['ratio_high']:.2f})"
    peaks = " | ".join(
        f"{a[name]:.2f} / {b[name]:.2f} = {a[name] / b[name]:.2f}" for name in ("peak_gb", "above_start_gb")
    )
    print(f"| {case} | {a['tokens_per_second']:,.0f} | {b['tokens_per_second']:,.0f} | {spread} | {peaks} |")
    print(json.dumps(result))
