"""`phi3-jax init`: five answers, as options, typed, or left to the defaults; and a file by which one can train."""

import json
import re

import pytest
import yaml

from phi3_jax.cli import main
from phi3_jax.demo import demo_path

ANSWERS = ["--device", "cpu", "--model", "demo", "--data", "chats.jsonl", "--method", "lora", "--output", "mine.yaml"]


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lines = demo_path("orders_train.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "chats.jsonl").write_text("".join(lines[:120]))
    return tmp_path


def test_without_a_terminal_what_is_missing_has_its_default(here, capsys):
    assert main(["init"]) == 0
    said = capsys.readouterr().out
    text = (here / "run.yaml").read_text()
    run = yaml.safe_load(text)
    assert run["model"]["name_or_path"] == str(demo_path("base"))
    assert (run["data"]["train"], run["training"]["output_dir"]) == ("chats.jsonl", "out/run")
    assert re.search(r"max_length: 128  # positions of a row", text)
    for words in ("120; columns messages; read 120 as messages", "by phi3-jax plan --config run.yaml --topology here"):
        assert words in said
        assert words in text
    assert "phi3-jax train --config run.yaml" in said


def test_what_init_writes_is_what_plan_and_train_read(here, capsys):
    assert main(["init", *ANSWERS]) == 0
    memory = re.search(r"Memory: ([\d.]+) GB", capsys.readouterr().out)[1]
    assert main(["plan", "--config", "mine.yaml", "--topology", "cpu", "--estimate", "--json"]) == 0
    assert f"{json.loads(capsys.readouterr().out)['hbm_bytes_per_device'] / 1e9:.2f}" == memory
    assert main(["train", "--config", "mine.yaml", "--print-config"]) == 0
    assert "full_finetuning: false" in capsys.readouterr().out


def test_a_terminal_is_asked_until_the_answer_can_be_used(here, capsys, monkeypatch):
    typed = iter(["gpu:rtx", "cpu", "", "nowhere.jsonl", "", "", "mine.yaml"])
    asked = []

    def answer(question):
        asked.append(question)
        return next(typed)

    monkeypatch.setattr("builtins.input", answer)
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    assert main(["init"]) == 0
    said = capsys.readouterr().out
    assert "gpu:rtx" in said
    assert "nowhere.jsonl" in said
    assert [question.partition(" [")[2].rstrip("] ") for question in asked] == [
        *("here", "here", "demo", "chats.jsonl", "chats.jsonl", "auto", "run.yaml")
    ]
    assert (here / "mine.yaml").is_file()


def test_columns_and_faults_are_told_as_to_training(here, capsys):
    rows = [{"q": "2 + 2?", "a": "4"}] * 30 + [{"q": "3 + 3?", "a": ""}]
    (here / "qa.jsonl").write_text("\n".join(map(json.dumps, rows)))
    command = ["init", "--device", "cpu", "--data", "qa.jsonl", "--columns", "prompt=q,completion=a"]
    assert main(command) == 2
    assert "qa.jsonl, row 31" in capsys.readouterr().err
    assert main([*command, "--skip-invalid"]) == 0
    assert "Left out: 1, the first qa.jsonl, row 31: " in capsys.readouterr().out
    data = yaml.safe_load((here / "run.yaml").read_text())["data"]
    assert (data["columns"], data["skip_invalid"]) == ({"prompt": "q", "completion": "a"}, True)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--columns", "q"], "prompt=question,completion=answer"),
        (["--device", "gpu:rtx"], "gpu:rtx"),
        (["--model", "nowhere/"], "nowhere"),
        (["--data", "nowhere.jsonl"], "nowhere.jsonl"),
        (["--method", "dora"], "auto, lora, qlora, full"),
        (["--output", "there.yaml"], "there.yaml is there already"),
        (["--output", "run.txt"], "run.txt is no YAML file"),
        (["--modell", "demo"], "did you mean --model"),
    ],
)
def test_a_wrong_answer_is_one_line_and_nothing_is_written(here, capsys, options, words):
    (here / "there.yaml").write_text("x")
    assert main(["init", *options]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert words in said
    assert not (here / "run.yaml").exists()


@pytest.mark.parametrize(
    ("files", "words"), [([], "no file of rows"), (["a.jsonl", "b.csv"], "which of a.jsonl, b.csv")]
)
def test_rows_that_are_not_named_must_be_the_only_ones(tmp_path, monkeypatch, capsys, files, words):
    monkeypatch.chdir(tmp_path)
    for name in files:
        (tmp_path / name).write_text("")
    assert main(["init", "--device", "cpu"]) == 2
    assert f"--data is not given, and {words}" in capsys.readouterr().err


@pytest.mark.slow  # a training run
def test_the_first_run_learns(here, capsys):
    assert main(["init", *ANSWERS]) == 0
    assert main(["train", "--config", "mine.yaml"]) == 0
    results = json.loads((here / "out" / "mine" / "all_results.json").read_text())
    rows = [json.loads(line) for line in (here / "out" / "mine" / "metrics.jsonl").read_text().splitlines()]
    first = next(row["eval_loss"] for row in rows if "eval_loss" in row)
    assert results["eval_loss"] < 0.05 * first
