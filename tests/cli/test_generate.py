"""`phi3-jax generate`: where prompts come from, who answers, and how answers are written."""

import json
import os
from pathlib import Path
from typing import Any

import jax
import pytest

from phi3_jax.cli import main
from phi3_jax.config.lora import LoraConfig
from phi3_jax.hf.checkpoint import Checkpoint
from phi3_jax.lora import init_lora
from phi3_jax.peft.save import save_adapter
from tests.helpers.checkpoints import OUTGROWN_ERROR, write_checkpoint, write_outgrown_checkpoint
from tests.helpers.commands import after_device

CHAT = {"messages": [{"role": "user", "content": "x y z"}, {"role": "assistant", "content": "known answer"}]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with settings of its own, and an adapter."""
    folder = tmp_path_factory.mktemp("generate")
    base = write_checkpoint(folder / "base")
    (base / "generation_config.json").write_text(json.dumps({"max_new_tokens": 4, "top_k": 7}))
    model = Checkpoint.open(base).load_model(dtype="float32")
    lora = init_lora(model, LoraConfig(r=2, lora_alpha=32, init_lora_weights=False), jax.random.key(1))
    save_adapter(folder / "tuned", lora, base_model_name_or_path=str(base))
    return folder


def run(capfd: Any, folder: Path, *options: str) -> str:
    capfd.readouterr()
    assert main(["generate", "--model", str(folder / "base"), *options]) == 0
    captured = capfd.readouterr()
    assert after_device(captured.err) == ""
    return captured.out


def rows(capfd: Any, folder: Path, *options: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in run(capfd, folder, "--json", *options).splitlines()]


def test_options_win_over_the_checkpoints_settings(folder, capfd):
    (row,) = rows(capfd, folder, "--prompt", "x y z")
    assert list(row) == ["prompt", "answer", "tokens", "finish_reason"]
    assert (row["prompt"], len(row["tokens"]), row["finish_reason"]) == ("x y z", 4, "length")
    (row,) = rows(capfd, folder, "--prompt", "x y z", "--max-new-tokens", "3", "--logprobs")
    assert len(row["tokens"]) == len(row["logprobs"]) == 3
    assert all(value < 0 for value in row["logprobs"])


def test_adapters_side_by_side_are_those_alone(folder, capfd, tmp_path):
    tuned = str(folder / "tuned")
    both = rows(capfd, folder, "--prompt", "x y z", "--adapter", "none", "--adapter", f"mine={tuned}")
    assert [row["adapter"] for row in both] == ["base", "mine"]
    (base,) = rows(capfd, folder, "--prompt", "x y z")
    (alone,) = rows(capfd, folder, "--prompt", "x y z", "--adapter", tuned)
    assert alone["adapter"] == "tuned"
    assert [row["tokens"] for row in both] == [base["tokens"], alone["tokens"]]
    assert base["tokens"] != alone["tokens"]
    file = tmp_path / "answers.txt"
    printed = run(
        capfd, folder, "--prompt", "x y z", "--adapter", "none", "--adapter", f"mine={tuned}", "--output", str(file)
    )
    assert printed == ""
    assert file.read_text() == f"base> {base['answer']}\nmine> {alone['answer']}\n"


def test_drawn_answers_depend_on_the_seed_alone(folder, capfd):
    drawn = ["--prompt", "x y z", "--temperature", "3"]
    first, again, other = (run(capfd, folder, *drawn, "--seed", seed) for seed in ("1", "1", "2"))
    assert first == again != other
    assert run(capfd, folder, *drawn, "--seed", "1", "--stream") == first
    two = rows(capfd, folder, *drawn, "--num-return-sequences", "2")
    assert [row["prompt"] for row in two] == ["x y z", "x y z"]
    assert two[0]["tokens"] != two[1]["tokens"]


def test_streamed_answers_come_in_order_and_end_before_a_stop_string(folder, capfd):
    plain = run(capfd, folder, "--prompt", "x y z", "--prompt", "a longer one", "--batch-size", "1")
    assert run(capfd, folder, "--prompt", "x y z", "--prompt", "a longer one", "--stream") == plain
    assert plain.startswith("[1] x y z\n")
    assert "\n\n[2] a longer one\n" in plain
    answer = run(capfd, folder, "--prompt", "x y z").removesuffix("\n")
    stop = answer[-2:]
    expected = answer[: answer.index(stop)] + "\n"
    assert run(capfd, folder, "--prompt", "x y z", "--stop", stop, "--stream") == expected
    assert run(capfd, folder, "--prompt", "x y z", "--stop", stop) == expected


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ([], ["--prompt", "--prompts", "required"]),
        (["--prompt", "a", "--prompts", "b"], ["--prompts", "not allowed with"]),
        (["--prompts", "absent.txt"], ["absent.txt", "cannot be read"]),
        (["--prompts", "empty.txt"], ["empty.txt", "no prompt"]),
        (["--prompts", "bad.jsonl"], ["bad.jsonl, line 1", "either prompt or messages", "text"]),
        (["--prompts", "latin.txt"], ["latin.txt", "UTF-8"]),
        (["--prompt", "a", "--raw", "--system", "b"], ["--system", "--raw"]),
        (["--prompt", "a", "--logprobs"], ["--logprobs", "--json"]),
        (["--prompt", "a", "--stream", "--json"], ["--stream", "--json"]),
        (["--prompt", "a", "--output", "no/such/file"], ["no/such/file", "no such folder"]),
        (["--prompt", "a", "--top-p", "2"], ["top_p is 2.0"]),
        (["--prompt", "a", "--temperature", "hot"], ["--temperature", "hot"]),
        (["--prompt", "a", "--no-repeat-ngram-size", "3"], ["no_repeat_ngram_size of transformers is not implemented"]),
        (["--prompt", "a", "--num-return-sequences", "2"], ["num_return_sequences is 2", "do_sample"]),
        (["--prompt", "a", "--prompt", "b" * 4090], ["--prompt 2 has 40", "4096 positions"]),
        (["--prompts", "messages.jsonl", "--raw"], ["messages.jsonl, line 1", "--raw"]),
        (["--prompt", "a", "--adapter", "x=no/such/adapter"], ["no/such/adapter"]),
        (["--prompt", "a", "--adapter", "none", "--adapter", "none=x"], ["cannot be called none"]),
    ],
)
def test_wrong_input_is_told_in_one_line(options, words, folder, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    Path("empty.txt").write_text("\n\n")
    Path("bad.jsonl").write_text('{"text": "x"}\n')
    Path("latin.txt").write_bytes(b"caf\xe9\n")
    Path("messages.jsonl").write_text(json.dumps(CHAT) + "\n")
    capfd.readouterr()
    assert main(["generate", "--model", str(folder / "base"), *options]) == 2
    captured = capfd.readouterr()
    (line,) = captured.err.splitlines()
    assert [word for word in words if word not in line] == []
    assert captured.out == ""


@pytest.mark.parametrize("more", [[], ["--stream"], ["--raw"]])
def test_a_token_that_the_model_has_no_row_for_is_named(more, tmp_path, capfd):
    base = write_outgrown_checkpoint(tmp_path / "base")
    assert main(["generate", "--model", str(base), "--prompt", "a", "--prompt", "a<call>", *more]) == 2
    captured = capfd.readouterr()
    assert captured.out == ""
    assert captured.err == f"phi3-jax: --prompt 2: {OUTGROWN_ERROR}\n"


def test_answers_that_are_there_are_kept_when_a_later_batch_fails(folder, monkeypatch, capfd):
    from phi3_jax.generation import text as text_module

    answers, calls = text_module.answers, []

    def fails_later(*arguments: Any, **rest: Any) -> Any:
        calls.append(1)
        if len(calls) > 1:
            raise RuntimeError("out of memory")
        return answers(*arguments, **rest)

    monkeypatch.setattr(text_module, "answers", fails_later)
    argv = ["generate", "--model", str(folder / "base"), "--json", "--batch-size", "1"]
    with pytest.raises(RuntimeError):
        main([*argv, "--prompt", "x y z", "--prompt", "a longer one"])
    (line,) = capfd.readouterr().out.splitlines()
    assert json.loads(line)["prompt"] == "a longer one"


def test_a_full_disk_is_told(folder, small_disk, capfd):
    with (small_disk / "filler").open("wb") as opened:
        os.posix_fallocate(opened.fileno(), 0, 3 * 2**20)
    file = small_disk / "answers.jsonl"
    argv = ["generate", "--model", str(folder / "base"), "--prompt", "x y z", "--json", "--output", str(file)]
    assert main(argv) == 2
    (line,) = after_device(capfd.readouterr().err).splitlines()
    assert line.startswith(f"phi3-jax: {file}: cannot be written (No space left on device)")
