"""The comparison of two programs that take turns."""

import importlib.util
import json
from pathlib import Path

import pytest

FILE = Path(__file__).parents[2] / "scripts" / "benchmarks" / "turns.py"


@pytest.fixture(scope="module")
def turns():
    spec = importlib.util.spec_from_file_location("turns", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def worker(turns, tmp_path, monkeypatch):
    """Makes a real worker process whose steps take memory."""
    monkeypatch.syspath_prepend(FILE.parent)
    script = tmp_path / "script.py"
    script.write_text(
        f"import sys, json; sys.path.insert(0, {str(FILE.parent)!r})\n"
        "from turns import Steps, serve, resident_bytes, reset_resident_peak\n"
        "settings = json.loads(sys.argv[3])\n"
        "def make():\n"
        "    print('noise on standard output')\n"
        "    if settings['bytes'] < 0: raise SystemExit('no memory to give')\n"
        "    first = bytearray(200_000_000); del first\n"
        "    def step():\n"
        "        block = bytearray(settings['bytes']); return 1.5\n"
        "    def peak(): return resident_bytes('VmHWM')\n"
        "    return Steps(step, resident_bytes, peak, reset_resident_peak, {'name': sys.argv[2]})\n"
        "serve(make)\n"
    )
    made = []

    def make(name: str, **settings):
        made.append(turns.Worker(str(script), name, settings))
        return made[-1]

    yield make
    for process in made:
        process.close()


class Canned:
    """A worker whose turns take what they are told to."""

    def __init__(self, name: str, *turns: float):
        self.name, self.start = name, {"memory": 10**9, "about": {}}
        self.turns = iter(turns)

    def take(self, steps: int) -> dict:
        seconds = next(self.turns)
        return {"seconds": seconds, "cpu_seconds": 2 * seconds, "loss": 0.0, "peak": 3 * 10**9}


def test_the_ratio_is_of_turns_next_to_each_other(turns):
    # A machine that slows down under both: the turns' medians mix what the pairs keep apart.
    ours, peer = Canned("a", 9, 1, 2, 10), Canned("b", 9, 2, 6, 20)
    result = turns.compare(ours, peer, warmup=1, steps=4, rounds=3, tokens=10)
    assert (result["ratio"], result["ratio_low"], result["ratio_high"], result["cpu_ratio"]) == (2, 2, 3, 2)
    assert (result["a"]["tokens_per_second"], result["b"]["tokens_per_second"]) == (10 * 4 / 2, 10 * 4 / 6)
    assert (result["a"]["peak_gb"], result["a"]["above_start_gb"]) == (3, 2)


def test_the_peak_is_that_of_the_steps(turns, worker, capsys):
    result = turns.compare(
        worker("a", bytes=50_000_000), worker("b", bytes=9_000_000), warmup=1, steps=2, rounds=2, tokens=9
    )
    # What a worker had in use before its steps is not counted among what these take.
    assert 0.04 < result["a"]["above_start_gb"] < 0.1
    assert result["b"]["above_start_gb"] < 0.04
    assert (result["a"]["loss"], result["b"]["about"]) == (1.5, {"name": "b"})
    turns.print_comparison(result, "a", "b", "case")
    row, last = capsys.readouterr().out.splitlines()[-2:]
    assert row.startswith("| case | ")
    assert json.loads(last) == result


def test_a_worker_that_fails_is_named(worker):
    with pytest.raises(SystemExit, match="a: stopped with status 1"):
        worker("a", bytes=-1)
