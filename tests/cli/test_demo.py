"""`phi3-jax demo`: its options reach the run."""

from phi3_jax.cli import main
from phi3_jax.training import loop


def test_folder_and_seed_are_the_runs(monkeypatch, tmp_path):
    runs = []
    monkeypatch.setattr(loop, "train", runs.append)
    assert main(["demo", "--output", str(tmp_path / "out"), "--seed", "3"]) == 0
    (run,) = runs
    assert (run.training.output_dir, run.training.seed) == (str(tmp_path / "out"), 3)
