"""The tokenizer that an adapter brings is used with it, by every command alike."""

import io
import json
import shutil
from pathlib import Path

import pytest

from phi3_jax import InputError
from phi3_jax.cli import main
from phi3_jax.evaluate import evaluate
from phi3_jax.hf.checkpoint import Checkpoint
from phi3_jax.hf.tokenizer import load_tokenizer
from phi3_jax.peft.adapter import PeftAdapter
from phi3_jax.peft.base import open_base
from phi3_jax.peft.save import save_adapter
from phi3_jax.peft.tokenizer import differences
from tests.helpers.checkpoints import write_checkpoint
from tests.helpers.models import random_lora
from tests.helpers.rows import write_chats

# Says "a b" before what the user says.
TEMPLATE = (
    "{% for m in messages %}{{ '<|user|>a b ' + m['content'] + '<|end|>' if m['role'] == 'user' else "
    "'<|assistant|>' + m['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A base, and adapters of it: with no tokenizer, with the base's, with another template, and with that alone."""
    folder = tmp_path_factory.mktemp("tokenizers")
    write_checkpoint(folder / "base")
    lora = random_lora(Checkpoint.open(folder / "base").load_model(dtype="float32"))
    own = load_tokenizer(folder / "base")
    for name, tokenizer in {"bare": None, "same": own, "other": own}.items():
        save_adapter(folder / name, lora, tokenizer=tokenizer, base_model_name_or_path=str(folder / "base"))
    shutil.copytree(folder / "bare", folder / "alone")
    for name in ("other", "alone"):
        (folder / name / "chat_template.jinja").write_text(TEMPLATE)
    write_chats(folder / "chats.jsonl", number=2)
    return folder


def opened(folder: Path, *names: str):
    return open_base(folder / "base", [PeftAdapter.open(folder / name) for name in names])


def test_a_tokenizer_as_the_bases_is_not_spoken_of(folder, capsys):
    base = opened(folder, "bare", "same")
    assert differences(base.tokenizer, load_tokenizer(folder / "base")) == ""
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("name", ["other", "alone"])
def test_an_adapters_template_is_used_and_that_is_said(folder, name, capsys):
    base = opened(folder, name)
    assert base.tokenizer.chat_template == TEMPLATE
    line = f"tokenizer: that of {folder / name}, with another chat template than the base's\n"
    assert capsys.readouterr().err == line


def test_a_further_template_is_a_difference_too(folder, tmp_path):
    shutil.copytree(folder / "base", tmp_path / "named")
    shutil.copytree(folder / "bare", tmp_path / "named", dirs_exist_ok=True)
    (tmp_path / "named" / "config.json").unlink()
    (tmp_path / "named" / "additional_chat_templates").mkdir()
    (tmp_path / "named" / "additional_chat_templates" / "tool_use.jinja").write_text(TEMPLATE)
    base = open_base(folder / "base", [PeftAdapter.open(tmp_path / "named")])
    assert base.tokenizer.chat_template["tool_use"] == TEMPLATE


def test_adapters_that_go_with_different_ones_are_refused(folder):
    for names in (("other", "bare"), ("same", "alone")):
        with pytest.raises(InputError, match=f"{names[1]} goes with another chat template than .*{names[0]}.* one at"):
            _ = opened(folder, *names).tokenizer
    assert opened(folder, "other", "alone").tokenizer.chat_template == TEMPLATE
    with pytest.raises(InputError, match="other goes with another chat template than what is in use here"):
        opened(folder, "bare").check_tokenizer(PeftAdapter.open(folder / "other"))


def test_what_differs_is_named(folder, tmp_path):
    one = load_tokenizer(folder / "base")
    shutil.copytree(folder / "same", tmp_path / "tokens")
    raw = json.loads((tmp_path / "tokens" / "tokenizer.json").read_text())
    raw["added_tokens"].append({**raw["added_tokens"][-1], "id": 44, "content": "<new>"})
    (tmp_path / "tokens" / "tokenizer.json").write_text(json.dumps(raw))
    other = load_tokenizer(tmp_path / "tokens")
    other.eos_token = "<|end|>"
    assert differences(other, one) == "other tokens and another end token"


def test_every_command_uses_it(folder, tmp_path, capfd, monkeypatch):
    """What is rendered has the template's words; with the adapter without one it has not."""
    said = "tokenizer: that of "
    adapter, plain = str(folder / "other"), str(folder / "bare")
    prompt = ["--prompt", "c", "--max-new-tokens", "4", "--json", "--dtype", "float32"]
    answers = []
    for options in (["--adapter", adapter], ["--adapter", plain], ["--adapter", plain, "--raw"]):
        text = prompt if "--raw" not in options else ["--prompt", "<|user|>a b c<|end|><|assistant|>", *prompt[2:]]
        assert main(["generate", *options, *text]) == 0
        found = capfd.readouterr()
        assert (said in found.err) == (options == ["--adapter", adapter])
        answers.append(json.loads(found.out)["tokens"])
    assert answers[0] == answers[2] != answers[1]

    rows = folder / "chats.jsonl"
    found = evaluate(None, rows, adapters={"it": adapter}, metrics="exact_match", max_new_tokens=2)
    (one, *_) = found.predictions["it"]
    assert one.prompt.startswith("<|user|>a b ")
    run = [f"--model.name_or_path={folder / 'base'}", f"--data.train={rows}", f"--peft.init_from={adapter}"]
    assert main(["data", *run, "--json"]) == 0
    found = capfd.readouterr()
    assert "<|user|>a b " in json.loads(found.out)["sets"][0]["first_rows"][0]["text"]
    assert said in found.err
    monkeypatch.chdir(tmp_path)
    small = ["--training.max_steps=1", "--data.max_length=32", "--model.dtype=float32", "--logging.tensorboard=false"]
    assert main(["train", *run, *small]) == 0
    assert "first row, targets in ⟦⟧: <|user|>a b " in capfd.readouterr().out
    assert load_tokenizer("out/adapter").chat_template == TEMPLATE


def test_the_harness_and_chat_use_it(folder, capfd, monkeypatch):
    from phi3_jax.evaluate.lm_harness import Phi3JaxLM

    loaded = Phi3JaxLM.from_pretrained(adapter=str(folder / "alone"), dtype="float32")
    assert loaded.apply_chat_template([{"role": "user", "content": "c"}]) == "<|user|>a b c<|end|><|assistant|>"
    monkeypatch.setattr("sys.stdin", io.StringIO(f"/adapter other={folder / 'other'}\n/quit\n"))
    assert main(["chat", "--adapter", str(folder / "bare"), "--dtype", "float32"]) == 2
    assert "other goes with another chat template than what is in use here" in capfd.readouterr().err
