"""Where a run's figures go."""

import json

from phi3_jax.training.metrics import MetricsLog
from phi3_jax.training.progress import Stopwatch
from tests.helpers.runs import run_config


def test_rows_after_the_checkpoint_are_written_again(tmp_path):
    run = run_config(tmp_path)
    lines = [{"step": step, "loss": float(step)} for step in (1, 2, 3)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines) + '{"step": 4, "lo')
    log = MetricsLog(tmp_path, run, keep_rows=2)
    assert log.history == lines[:2]
    log.write({"step": 3, "loss": 9.0})
    log.close()
    assert [json.loads(line)["loss"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [1, 2, 9]


def test_a_host_that_does_not_write_keeps_the_history(tmp_path):
    log = MetricsLog(tmp_path, run_config(tmp_path), keep_rows=0, writes=False)
    log.write({"step": 1})
    log.close()
    assert log.history == [{"step": 1}]
    assert not (tmp_path / "metrics.jsonl").exists()


def test_a_stopped_watch_shows_nothing():
    watch = Stopwatch()
    assert watch.stop() == 0
    watch.start()
    assert watch.stop() > 0
    assert watch.stop() == 0
