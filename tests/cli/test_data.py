"""`phi3-jax data`."""

import json
import re
import shlex
from pathlib import Path

import pytest

from phi3_jax.cli import main
from tests.helpers.checkpoints import OUTGROWN_ERROR, RAW, write_outgrown_checkpoint
from tests.helpers.commands import refusal
from tests.helpers.tokenizers import PHI_3_TOKENS, PHI_4_MINI, phi4_tokenizer

ROOT = Path(__file__).parents[2]
CHATS = [
    {"messages": [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "It is 4."}]},
    {"messages": [{"role": "user", "content": "the " * 60}, {"role": "assistant", "content": "Yes."}]},
]
ALPACA = [{"instruction": "Add.", "input": "2 and 2", "output": "4"}]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A checkpoint's folder without weights."""
    folder = tmp_path_factory.mktemp("model") / "mini"
    phi4_tokenizer(PHI_4_MINI, markers=PHI_3_TOKENS).save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(RAW | {"vocab_size": 512, "max_position_embeddings": 256}))
    return str(folder)


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Writes rows into a file, here, and gives its name."""
    monkeypatch.chdir(tmp_path)

    def written(name, rows):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        return name

    return written


def described(capfd, *arguments):
    """What `data --json` prints."""
    assert main(["data", *arguments, "--json"]) == 0
    captured = capfd.readouterr()
    assert captured.err == ""
    return json.loads(captured.out)


def test_json_has_every_file_with_its_counts_and_first_rows(model, write, capfd):
    files = write("chats.jsonl", CHATS), write("alpaca.jsonl", ALPACA)
    found = described(capfd, *files, "--model", model, "--show", "2", "--data.max_length=256", "--data.packing=false")
    assert found["model"] == model
    assert found["settings"]["max_length"] == 256
    assert [part["name"] for part in found["sets"]] == list(files)
    chats, alpaca = found["sets"]
    assert (chats["rows"], alpaca["rows"]) == (2, 1)
    assert chats["length_figures"]["max"] == chats["longest"] > chats["length_figures"]["min"]
    assert chats["packing_efficiency"] is None
    first, second = chats["first_rows"]
    assert first["text"] == "<|user|>2 + 2?<|end|><|assistant|>⟦It is 4.<|end|>⟧<|endoftext|>"
    assert first["row"] == "chats.jsonl, row 1"
    assert len(second["input_ids"]) == len(second["loss_mask"]) > 60
    assert chats["tokens"] == len(first["input_ids"]) + len(second["input_ids"])
    assert chats["target_tokens"] == sum(first["loss_mask"]) + sum(second["loss_mask"])
    assert second["text"].count("the") == 60
    assert len(alpaca["first_rows"]) == 1


def test_settings_of_a_run_hold(model, write, capfd):
    rows = [{"question": f"{i}?", "answer": str(i)} for i in range(10)]
    config = {
        "model": {"name_or_path": model},
        "data": {
            "train": write("rows.jsonl", rows),
            "columns": {"prompt": "question", "completion": "answer"},
            "eval_fraction": 0.2,
        },
    }
    write("run.yaml", [config])  # JSON is YAML
    train, held_out = described(capfd, "--config", "run.yaml")["sets"]
    assert (train["name"], train["rows"]) == ("train", 8)
    assert (held_out["name"], held_out["rows"]) == ("eval", 2)
    (few,) = described(capfd, "--config", "run.yaml", "--data.eval_fraction=0", "--data.max_rows=3")["sets"]
    assert few["rows"] == 3
    # A recipe's split, which a file has not.
    without = described(capfd, "--config", "run.yaml", "--data.eval_fraction=0", "--data.eval_split=test_sft")
    assert [part["name"] for part in without["sets"]] == ["train"]
    assert "no evaluation: rows.jsonl has no split test_sft" in without["note"]
    # A file that is named takes the place of both.
    (other,) = described(capfd, write("others.jsonl", rows[:4]), "--config", "run.yaml")["sets"]
    assert (other["name"], other["rows"]) == ("others.jsonl", 4)


def test_without_a_terminal_targets_are_bracketed(model, write, capfd):
    assert main(["data", write("chats.jsonl", CHATS), "--model", model, "--data.max_length=256"]) == 0
    printed = capfd.readouterr().out
    assert "\x1b" not in printed
    assert "⟦It is 4.<|end|>⟧" in printed
    assert "chats.jsonl, row 1: " in printed
    assert "row 2" not in printed


def test_the_page_shows_what_the_command_prints(monkeypatch, capfd):
    monkeypatch.chdir(ROOT)
    page = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
    (typed, shown) = re.search(r"^\$ phi3-jax (data .*)\n((?:.*\n)+?)```", page, re.MULTILINE).groups()
    assert main(shlex.split(typed)) == 0
    assert capfd.readouterr().out.rstrip() == shown.rstrip()


def test_a_tokenizer_without_a_configuration_will_do(write, tmp_path, capfd):
    phi4_tokenizer(PHI_4_MINI, markers=PHI_3_TOKENS).save_pretrained(tmp_path / "bare")
    assert described(capfd, write("chats.jsonl", CHATS), "--model", "bare", "--show=0")["sets"][0]["first_rows"] == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["good.jsonl", "bad.jsonl"], ["bad.jsonl, row 2", "no assistant turn", "skip_empty"]),
        (["absent.jsonl"], ["absent.jsonl", "no such"]),
        (["good.jsonl", "--data.max_lenght", "8"], ["--data.max_lenght", "--data.max_length"]),
        (["good.jsonl", "--data.eval_fraction", "0.1"], ["--data.eval_fraction", "beside good.jsonl"]),
        (["good.jsonl", "--show", "some"], ["--show", "some", "whole number"]),
        (["good.jsonl", "--config", "absent.yaml"], ["absent.yaml"]),
        (["good.jsonl", "--shwo", "1", "bad.jsonl"], ["--shwo", "--show"]),
        (["good.jsonl", "--show", "1", "bad.jsonl"], ["bad.jsonl", "in one place"]),
        (["long.jsonl"], ["256 positions", "data.max_length 256"]),
        ([], ["no data is named"]),
    ],
)
def test_wrong_input_is_one_line(arguments, words, model, write, capfd):
    write("good.jsonl", CHATS[:1])
    write("bad.jsonl", [CHATS[0], {"messages": CHATS[0]["messages"][:1]}])
    write("long.jsonl", [{"prompt": "the " * 300, "completion": "x"}])
    line = refusal(capfd, ["data", "--model", model, *arguments])
    assert [word for word in words if word not in line] == []


def test_without_a_model_the_line_says_so(write, capfd):
    assert "--model is not given" in refusal(capfd, ["data", write("chats.jsonl", CHATS)])


def test_a_token_that_the_model_has_no_row_for_is_named(write, tmp_path, capfd):
    base = str(write_outgrown_checkpoint(tmp_path / "base"))
    rows = [{"prompt": "a", "completion": answer} for answer in ("b", "b<call>")]
    line = refusal(capfd, ["data", write("calls.jsonl", rows), "--model", base])
    assert line == f"phi3-jax: calls.jsonl, row 2: {OUTGROWN_ERROR}"
    assert main(["data", write("calls.jsonl", rows[:1]), "--model", base]) == 0
    assert "none for 1 token of the tokenizer: '<call>' (60)" in " ".join(capfd.readouterr().out.split())
