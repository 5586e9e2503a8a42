"""`phi3-jax train`."""

import json

import yaml

from phi3_jax.cli import main
from tests.helpers.commands import refusal, train_arguments


def test_the_command_line_wins_over_the_files_and_a_later_file_over_an_earlier(tmp_path, capfd):
    first, second = tmp_path / "first.yaml", tmp_path / "second.yaml"
    first.write_text("model:\n  name_or_path: a\ntraining:\n  max_steps: 1\n  seed: 1\n  logging_steps: 1\n")
    second.write_text("training:\n  max_steps: 2\n  seed: 2\n")
    argv = ["train", "--training.seed", "3", f"--config={first}", "--config", str(second), "--print_config"]
    assert main([*argv, "--data.columns.prompt=q", "--training.bf16", "true", "--training.fsdp", "full_shard"]) == 0
    captured = capfd.readouterr()
    printed = yaml.safe_load(captured.out)
    assert printed["model"]["name_or_path"] == "a"
    assert printed["model"]["dtype"] == "bfloat16"
    assert {name: printed["training"][name] for name in ("max_steps", "seed", "logging_steps")} == {
        "max_steps": 2,
        "seed": 3,
        "logging_steps": 1,
    }
    assert printed["data"]["columns"] == {"prompt": "q"}
    assert captured.err == "passed over: training.fsdp (the section parallel says how devices share the work)\n"


def test_a_run_trains_refuses_a_second_time_and_shows_what_it_wrote(base, chats, tmp_path, capfd):
    out = tmp_path / "out"
    argv = train_arguments(base, chats, out)
    assert main(argv) == 0
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    line = refusal(capfd, argv)
    assert str(out) in line
    assert "training.resume_from_checkpoint" in line
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before
    # The run's own configuration is one to start from.
    assert main(["train", "--config", str(out / "config.yaml"), f"--training.output_dir={tmp_path / 'again'}"]) == 0
    capfd.readouterr()
    assert main(["info", str(out), "--json"]) == 0
    (found,) = json.loads(capfd.readouterr().out)["adapters"]
    assert found["r"] == 16
    assert found["base_model_name_or_path"] == str(base)
