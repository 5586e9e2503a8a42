"""The demo's run, of the installed package's files. That it learns is in test_demo.py."""

from pathlib import Path

from phi3_jax.demo.run import demo_config


def test_its_files_are_there():
    run = demo_config("somewhere", seed=5)
    assert (run.training.output_dir, run.training.seed, run.training.overwrite_output_dir) == ("somewhere", 5, True)
    assert (Path(run.model.name_or_path) / "config.json").is_file()
    assert all(Path(path).is_file() for path in (run.data.train, run.data.eval))
