"""Kills training runs at random instants with SIGKILL, resumes them, and compares what they end with.

    python scripts/kill_test.py --kills 200        # about 20 minutes on two cores

Each run is `phi3-jax train` on the built-in base with a checkpoint every two steps, and always with
`--training.resume_from_checkpoint true`. It is killed a few times, then left alone until it is done: its adapter
must have the bytes of an undisturbed run's, and metrics.jsonl every line once. After every kill whatever looks
whole in its folder must be whole. Half of the instants are drawn evenly over a run's time, half fall into the
moments after a file appeared: there something is being written or removed.

Every attempt is a process of its own. To save the seconds that Python takes to import JAX, it is forked from one
that has imported everything and done nothing else; `--spawn` starts the program anew each time. Exit status 1 where
anything differs.
"""

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
DATA = ROOT / "phi3_jax" / "demo"
STEPS, EVERY, EVALUATE = 12, 2, 4
CLOCK = ("tokens_per_second", "mfu")  # figures of metrics.jsonl that are never the same
ADAPTER = "adapter/adapter_model.safetensors"

SETTINGS = {
    "model": {"name_or_path": str(DATA / "base"), "dtype": "float32"},
    "peft": {"r": 4, "lora_dropout": 0.1},
    "data": {
        "train": str(DATA / "orders_train.jsonl"),
        "eval": str(DATA / "orders_eval.jsonl"),
        "max_rows": 48,
        "max_length": 64,
    },
    "training": {
        "max_steps": STEPS,
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 8,
        "learning_rate": 1e-3,
        "gradient_checkpointing": False,
        "logging_steps": 1,
        "save_steps": EVERY,
        "save_total_limit": 2,
        "eval_steps": EVALUATE,
        "load_best_model_at_end": True,
        "eval_generations": 2,
        "eval_max_new_tokens": 2,
        "resume_from_checkpoint": True,
    },
    "logging": {"progress": False, "tensorboard": False},
}

# Files whose appearance says that something is being written, and what: others follow within milliseconds.
SIGNS = {
    "run.lock": "at the start",
    "config.yaml": "at the start",
    "metrics.jsonl": "at the start",
    "checkpoints/*.saving*": "while a checkpoint was written",
    "checkpoints/*[0-9]": "after a checkpoint, while one was removed",
    ".adapter.*": "while the adapter was written",
    ADAPTER: "after the adapter, while results were written",
    "all_results.json": "while the report was written",
    "report.html": "after the report",
}


@dataclass
class Tally:
    """What was seen.

    Attributes:
        places: Where kills hit.
        lines: How many metrics.jsonl had then.
    """

    kills: int = 0
    runs: int = 0
    places: Counter[str] = field(default_factory=Counter)
    lines: Counter[int] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)


class Starter:
    """Starts `phi3-jax train` in a process of its own."""

    def __init__(self, folder: Path, spawn: bool):
        self.spawn = spawn
        self.environment = {
            "JAX_PLATFORMS": "cpu",
            "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "HF_HUB_OFFLINE": "1",
        }
        os.environ.update(self.environment)
        if not spawn:
            import transformers

            import phi3_jax.training.loop

            _ = phi3_jax.training.loop, transformers.AutoTokenizer  # that is imported when it is asked for

    def __call__(self, output: Path) -> int:
        """The new process's id."""
        arguments = ["train", "--config", str(output.parent / "run.yaml"), "--training.output_dir", str(output)]
        log = os.open(output.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        try:
            if self.spawn:
                command = [
                    sys.executable,
                    "-c",
                    "import sys; from phi3_jax.cli import main; sys.exit(main())",
                    *arguments,
                ]
                return subprocess.Popen(command, stdout=log, stderr=log, cwd=ROOT).pid
            pid = os.fork()
            if pid:
                return pid
            status = 1
            try:
                from phi3_jax.cli.main import main

                os.dup2(log, 1)
                os.dup2(log, 2)
                status = main(arguments)
                sys.stdout.flush()
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(status)
        finally:
            os.close(log)


def finish(pid: int) -> int:
    """Waits for the process; its exit status, negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def kill_at(pid: int, instant: Callable[[], bool]) -> bool:
    """Kills the process once it is time to; False where it was done before."""
    while not instant():
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            if status:
                raise RuntimeError(f"exit status {os.waitstatus_to_exitcode(status)}")
            return False
        time.sleep(0.0005)
    os.kill(pid, 9)
    return finish(pid) == -9


def draw_instant(rng: random.Random, output: Path, seconds: float) -> tuple[Callable[[], bool], str]:
    """What says that the instant to kill at has come, and where in the run that is."""
    start = time.monotonic()
    if rng.random() < 0.5:
        wait = rng.uniform(0, seconds)
        return (lambda: time.monotonic() - start > wait), "at any time"
    sign = rng.choice(list(SIGNS))
    skip = rng.randrange(STEPS // EVERY) if sign.startswith("checkpoints") else 0  # how often it is let pass
    delay = rng.choice([0.0, rng.uniform(0, 0.005), rng.uniform(0, 0.05)])
    seen = files(output, sign)
    state = {"left": skip + 1, "since": 0.0}

    def instant() -> bool:
        new = files(output, sign) - seen
        seen.update(new)
        state["left"] -= len(new)
        if new and state["left"] <= 0 and not state["since"]:
            state["since"] = time.monotonic()
        return bool(state["since"]) and time.monotonic() - state["since"] >= delay

    return instant, SIGNS[sign]


def files(output: Path, pattern: str) -> set[int]:
    """Those that are there, by number: one that is replaced has another."""
    found = set()
    for path in output.glob(pattern):
        with suppress(FileNotFoundError):
            found.add(path.stat().st_ino)
    return found


def rows(output: Path) -> list[dict[str, Any]]:
    lines = (output / "metrics.jsonl").read_text().splitlines()
    return [{name: value for name, value in json.loads(line).items() if name not in CLOCK} for line in lines]


def what_is_not_whole(output: Path, expected: bytes) -> list[str]:
    """What a kill left that looks whole and is not."""
    from phi3_jax.system.manifest import Damaged, check

    problems = []
    if (output / "adapter" / "adapter_config.json").exists() and (output / ADAPTER).read_bytes() != expected:
        problems.append("the adapter is not whole")
    for checkpoint in (output / "checkpoints").glob("*"):
        try:
            if checkpoint.name.isdecimal():
                check(checkpoint, thoroughly=True)
        except Damaged as damage:
            problems.append(f"checkpoint {checkpoint.name}: {damage}")
    for file in output.glob("*.json"):
        try:
            json.loads(file.read_text())
        except ValueError:
            problems.append(f"{file.name} is not whole")
    report = output / "report.html"
    if report.exists() and not report.read_text().rstrip().endswith("</html>"):
        problems.append("report.html is not whole")
    return problems


def differences(output: Path, whole: Path) -> list[str]:
    problems = []
    if (output / ADAPTER).read_bytes() != (whole / ADAPTER).read_bytes():
        problems.append("the adapter differs")
    if rows(output) != rows(whole):
        problems.append(f"metrics.jsonl differs: steps {[row['step'] for row in rows(output)]}")
    left = [path.name for path in output.iterdir() if path.name.startswith(".") or path.name.endswith(".tmp")]
    left += [path.name for path in (output / "checkpoints").iterdir() if not path.name.isdecimal()]
    if left:
        problems.append(f"left behind: {', '.join(left)}")
    return problems


def disturb(start: Starter, output: Path, whole: Path, seconds: float, rng: random.Random, kills: int) -> Tally:
    """One run that is killed up to so many times, and what it ended with."""
    tally = Tally(runs=1)
    expected = (whole / ADAPTER).read_bytes()
    try:
        for _ in range(3 * kills):  # some come too late; what is done is then resumed all the same
            instant, place = draw_instant(rng, output, seconds)
            if kill_at(start(output), instant):
                tally.kills += 1
                tally.places[place] += 1
                lines = output / "metrics.jsonl"
                tally.lines[lines.read_bytes().count(b"\n") if lines.exists() else 0] += 1
                tally.problems += what_is_not_whole(output, expected)
            if tally.kills == kills:
                break
        status = finish(start(output))
        if status:
            raise RuntimeError(f"exit status {status}")
        tally.problems += differences(output, whole)
    except RuntimeError as error:
        log = output.with_suffix(".log").read_text().strip().splitlines() or [""]
        tally.problems.append(f"{error}: {log[-1]}")
    tally.problems = [f"{output.name}: {problem}" for problem in tally.problems]
    return tally


def test(folder: Path, kills: int, seed: int, spawn: bool) -> Tally:
    """Disturbs runs in `folder` until so many kills have hit; prints a line for each run."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "run.yaml").write_text(json.dumps(SETTINGS))  # JSON is YAML
    start, whole = Starter(folder, spawn), folder / "undisturbed"
    seconds = 0.0
    for output in (folder / "first", whole):  # the first one compiles
        begin = time.monotonic()
        status = finish(start(output))
        if status:
            raise SystemExit(f"the undisturbed run failed: {output.with_suffix('.log').read_text()[-2000:]}")
        seconds = time.monotonic() - begin
    total = Tally(problems=[f"undisturbed: {problem}" for problem in differences(whole, folder / "first")])
    trained = [row["step"] for row in rows(whole) if "loss" in row]
    assert trained == list(range(1, STEPS + 1)), trained
    rng = random.Random(seed)
    while total.kills < kills:
        output = folder / f"run{total.runs}"
        tally = disturb(start, output, whole, seconds, rng, min(rng.randint(1, 6), kills - total.kills))
        total.kills, total.runs = total.kills + tally.kills, total.runs + 1
        total.places, total.lines = total.places + tally.places, total.lines + tally.lines
        total.problems += tally.problems
        print(f"{output.name}: {tally.kills} kills, {tally.problems or 'the same result'}", flush=True)
        if not tally.problems:
            shutil.rmtree(output)
    return total


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--spawn", action="store_true", help="start the program anew for every attempt")
    parser.add_argument("--folder", type=Path, help="new folder to work in, kept (default: a temporary one)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary) / "kills"
        total = test(folder.absolute(), arguments.kills, arguments.seed, arguments.spawn)
    print(f"\n{total.kills} kills in {total.runs} runs, seed {arguments.seed}")
    print("where they hit:", ", ".join(f"{name} {count}" for name, count in total.places.most_common()))
    print("lines of metrics.jsonl by then:", ", ".join(f"{line}: {n}" for line, n in sorted(total.lines.items())))
    if total.problems:
        print("PROBLEMS:", *total.problems, sep="\n  ")
        return 1
    print(f"all {total.kills} resumed to byte-identical adapters, with every step once in metrics.jsonl")
    return 0


if __name__ == "__main__":
    sys.exit(main())
