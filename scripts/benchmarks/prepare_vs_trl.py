"""Preparing chats against TRL: a file of messages in, token ids and targets out, both from a cold cache.

    python scripts/benchmarks/prepare_vs_trl.py --tokenizer microsoft/Phi-3.5-mini-instruct
    python scripts/benchmarks/prepare_vs_trl.py --tokenizer FOLDER --rows 5000

Ours is `prepare_data`, TRL's is what SFTTrainer does before its first step (`load_dataset`, then its maps: rendering,
tokenising, labels, truncation), with its defaults and with `dataset_num_proc` of the cores. Each has a process of its
own on the same cores, and a cache folder of its own that is empty. The clock starts when libraries are imported and
the tokenizer is loaded. Memory is the largest sum of what the process and its children hold (shared pages counted
once), and what of it came after that start. Prints a table and, last, one line of JSON.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from time import perf_counter
from typing import Any

from turns import limit_threads


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--tokenizer", default="microsoft/Phi-3.5-mini-instruct", help="a folder or a hub id, with a chat template")
    add("--rows", type=int, default=100_000, help="chats (default: 100,000)")
    add("--words", type=int, default=140, help="words of a chat (default: 140, about 300 tokens of Phi-3's)")
    add("--threads", type=int, default=2, help="cores for each (default: 2)")
    add("--only", nargs="*", help="of phi3_jax, TRL, TRL-processes; default: all")
    return parser.parse_args()


def write_chats(path: Path, rows: int, words: int) -> None:
    """Two questions and two answers each, of words that are as frequent as those of a language."""
    rng = random.Random(0)
    syllables = [a + b for a in "bcdfghklmnprstvw" for b in ("a", "e", "i", "o", "u", "an", "er", "ing", "ou")]
    known = ["".join(rng.choices(syllables, k=rng.choice((1, 1, 2, 2, 3)))) for _ in range(20_000)]
    weights = [1 / rank for rank in range(1, len(known) + 1)]
    drawn = rng.choices(known, weights, k=2**20)

    def text(number: int) -> str:
        start = rng.randrange(len(drawn) - number)
        return " ".join(drawn[start : start + number]).capitalize() + f". {rng.randint(0, 9999)}\n"

    with path.open("w", encoding="utf-8") as file:
        for _ in range(rows):
            parts = [("user", words // 8), ("assistant", words * 3 // 8)] * 2
            messages = [{"role": role, "content": text(number)} for role, number in parts]
            file.write(json.dumps({"messages": messages}) + "\n")


def ours(settings: argparse.Namespace) -> dict[str, Any]:
    from phi3_jax import load_tokenizer
    from phi3_jax.config.sections import DataSection
    from phi3_jax.data import prepare_data

    tokenizer = load_tokenizer(settings.tokenizer)
    data = DataSection(train=settings.file, max_length=1024, packing=False)
    started(settings)
    start, cpu = perf_counter(), cpu_seconds()
    rows = prepare_data(data, tokenizer, seed=0).train
    seconds = {"seconds": perf_counter() - start, "cpu_seconds": cpu_seconds() - cpu}
    return {**seconds, "rows": len(rows), "tokens": len(rows.input_ids)}


def trls(settings: argparse.Namespace) -> dict[str, Any]:
    import datasets
    import transformers
    import trl

    tokenizer = transformers.AutoTokenizer.from_pretrained(settings.tokenizer)
    shape: Any = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    config = transformers.Phi3Config(**shape, num_key_value_heads=1, vocab_size=len(tokenizer))
    model = transformers.AutoModelForCausalLM.from_config(config)
    processes = settings.threads if settings.worker == "TRL-processes" else None
    given: Any = {"dataset_num_proc": processes, "bf16": False, "use_cpu": True, "report_to": []}
    training = trl.SFTConfig(output_dir=settings.cache, max_length=1024, disable_tqdm=True, **given)
    started(settings)
    start, cpu = perf_counter(), cpu_seconds()
    rows = datasets.load_dataset("json", data_files=settings.file, split="train")
    trainer = trl.SFTTrainer(model, training, train_dataset=rows, processing_class=tokenizer)
    seconds = {"seconds": perf_counter() - start, "cpu_seconds": cpu_seconds() - cpu}
    tokens = sum(len(ids) for ids in trainer.train_dataset.with_format("arrow")["input_ids"])
    return {**seconds, "rows": len(trainer.train_dataset), "tokens": tokens, "trl": trl.__version__}


WORKERS = {"phi3_jax": ours, "TRL": trls, "TRL-processes": trls}


def cpu_seconds() -> float:
    """Of this process and of those of its children that have ended."""
    return sum(os.times()[:4])


def started(settings: argparse.Namespace) -> None:
    """Tells the process that measures that the work begins."""
    print("started", file=settings.answers, flush=True)


def work(name: str, settings: argparse.Namespace) -> None:
    settings.answers, settings.worker = os.fdopen(os.dup(1), "w"), name
    os.dup2(2, 1)  # what libraries print must not get between the answers
    limit_threads(settings.threads)
    result = WORKERS[name](settings)
    print(json.dumps(result), file=settings.answers, flush=True)


def proportional_bytes(process: int) -> int:
    """What a process and its children hold, a page that several share counted once (Linux)."""
    try:
        lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
        held = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))
        children = [
            c for task in Path(f"/proc/{process}/task").iterdir() for c in (task / "children").read_text().split()
        ]
    except (OSError, StopIteration):  # it has just ended
        return 0
    return held + sum(proportional_bytes(int(child)) for child in children)


def measure(name: str, settings: argparse.Namespace) -> dict[str, Any]:
    """One worker from start to end: what it answers, `peak_gb` and `above_start_gb`."""
    with tempfile.TemporaryDirectory() as cache:
        given = {**vars(settings), "cache": cache}
        environment = {**os.environ, "HF_DATASETS_CACHE": f"{cache}/datasets", "HF_HOME": f"{cache}/home"}
        # A tokenizer of the hub is loaded from where it was before.
        environment.setdefault("HF_HUB_CACHE", str(Path("~/.cache/huggingface/hub").expanduser()))
        environment |= {"JAX_PLATFORMS": "cpu", "PHI3_JAX_CACHE": f"{cache}/ours"}
        command = [sys.executable, __file__, "--worker", name, json.dumps(given)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
        assert process.stdout is not None
        if process.stdout.readline() != "started\n":
            raise SystemExit(f"{name}: stopped with status {process.wait()}; its message is above")
        first = peak = proportional_bytes(process.pid)
        ended = threading.Event()

        def watch() -> None:
            nonlocal peak
            while not ended.wait(0.25):
                peak = max(peak, proportional_bytes(process.pid))

        watcher = threading.Thread(target=watch)
        watcher.start()
        answer = process.stdout.readline()
        ended.set()
        watcher.join()
        if process.wait() or not answer:
            raise SystemExit(f"{name}: stopped with status {process.returncode}; its message is above")
    result: dict[str, Any] = json.loads(answer)
    rate = {"tokens_per_second": result["tokens"] / result["seconds"]}
    return {**result, **rate, "peak_gb": peak / 1e9, "above_start_gb": (peak - first) / 1e9}


def main() -> None:
    if sys.argv[1:2] == ["--worker"]:
        return work(sys.argv[2], argparse.Namespace(**json.loads(sys.argv[3])))
    settings = arguments()
    with tempfile.TemporaryDirectory() as folder:
        settings.file = f"{folder}/chats.jsonl"
        write_chats(Path(settings.file), settings.rows, settings.words)
        results = {name: measure(name, settings) for name in settings.only or WORKERS}
    print("| | seconds | of processors | tokens | tokens/s | ours to it | peak, GB | above start, GB |")
    print("|---|---|---|---|---|---|---|---|")
    best = results.get("phi3_jax", {}).get("tokens_per_second")
    for name, one in results.items():
        ratio = f"{best / one['tokens_per_second']:.2f}" if best else ""
        times = f"{one['seconds']:.1f} | {one['cpu_seconds']:.1f}"
        rates = f"{one['tokens']:,} | {one['tokens_per_second']:,.0f} | {ratio}"
        print(f"| {name} | {times} | {rates} | {one['peak_gb']:.2f} | {one['above_start_gb']:.2f} |")
    del settings.file
    print(json.dumps({**results, "settings": vars(settings)}))
    return None


if __name__ == "__main__":
    main()
