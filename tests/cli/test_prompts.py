"""The prompts of `phi3-jax generate`."""

import io
import json
import sys
from pathlib import Path
from typing import Any

import jax
import pytest

from phi3_jax.cli import main
from phi3_jax.cli.prompts import prompt_tokens, read_prompts
from phi3_jax.config.lora import LoraConfig
from phi3_jax.data.chat import ChatTokenizer
from phi3_jax.hf.checkpoint import Checkpoint
from phi3_jax.lora import init_lora
from phi3_jax.peft.save import save_adapter
from phi3_jax.system.errors import InputError
from tests.helpers.checkpoints import write_checkpoint
from tests.helpers.commands import after_device
from tests.helpers.tokenizers import JULY, phi3_tokenizer, phi4_mini_tokenizer

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


def test_prompts_of_any_source_in_their_order(folder, tmp_path, monkeypatch, capfd):
    text, lines = tmp_path / "prompts.txt", tmp_path / "prompts.jsonl"
    text.write_text("x y z\n\na longer one\r\nc\n")
    answers = {row["prompt"]: row["answer"] for row in rows(capfd, folder, "--prompts", str(text), "--batch-size", "2")}
    assert list(answers) == ["x y z", "a longer one", "c"]
    given = [row["answer"] for row in rows(capfd, folder, "--prompt", "x y z", "--prompt", "c", "--batch-size", "2")]
    assert given == [answers["x y z"], answers["c"]]
    lines.write_text(json.dumps({"prompt": "x y z"}) + "\n" + json.dumps(CHAT) + "\n")
    # The answer that the data gives is left out, so both ask the same.
    first, second = rows(capfd, folder, "--prompts", str(lines))
    assert first["answer"] == second["answer"] == answers["x y z"]
    assert second["messages"] == CHAT["messages"]
    for content in (text.read_bytes(), lines.read_bytes()):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
        assert rows(capfd, folder, "--prompts", "-", "--batch-size", "2")[0]["answer"] == answers["x y z"]


def test_system_message_and_raw_prompts_are_other_prompts(folder, capfd):
    found = [
        rows(capfd, folder, "--prompt", "x y z", *more)[0]["answer"]
        for more in ([], ["--raw"], ["--system", "be good"])
    ]
    assert len(set(found)) == 3


def test_what_a_prompt_brings_goes_to_the_template_or_is_told(tmp_path, capsys):
    tools = [{"type": "function", "function": {"name": "f"}}]
    messages = [{"role": "user", "content": "u"}]
    file = tmp_path / "prompts.jsonl"
    file.write_text(
        "".join(json.dumps({"messages": messages, "id": number, "tools": tools}) + "\n" for number in (1, 2))
    )
    prompt, _ = read_prompts(str(file))
    assert "prompts.jsonl: passed over, since nothing reads it: id (2 prompts)" in capsys.readouterr().err
    tokenizer = phi4_mini_tokenizer()
    ids = prompt_tokens(prompt, tokenizer, ChatTokenizer(tokenizer), None)
    system = {"role": "system", "content": "", "tools": json.dumps(tools)}
    assert ids == tokenizer.apply_chat_template([system, *messages], add_generation_prompt=True, return_dict=False)
    with pytest.raises(InputError, match="line 1: has tools, which the chat template does not show"):
        prompt_tokens(prompt, tokenizer, ChatTokenizer(phi3_tokenizer(JULY)), None)
    with pytest.raises(InputError, match="line 1: has messages, which --raw has no place for"):
        prompt_tokens(prompt, tokenizer, None, None)
