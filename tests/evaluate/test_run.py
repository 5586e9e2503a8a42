"""`phi3-jax evaluate`: what it measures, what it writes, how it goes on, and what it refuses."""

import json
import math
import os
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from phi3_jax.cli import main
from phi3_jax.config.sections import DataSection
from phi3_jax.data import prepare_data
from phi3_jax.evaluate import evaluate, predict
from phi3_jax.evaluate.names import name_models
from phi3_jax.generation.text import Answer
from phi3_jax.hf.checkpoint import Checkpoint
from phi3_jax.objectives.next_token import loss
from phi3_jax.peft.adapter import load_adapter
from phi3_jax.peft.save import save_adapter
from phi3_jax.system.errors import InputError
from tests.helpers.checkpoints import OUTGROWN_ERROR, write_checkpoint, write_outgrown_checkpoint
from tests.helpers.commands import after_device
from tests.helpers.evaluations import ROWS, arguments, run
from tests.helpers.models import random_lora, tiny_model
from tests.helpers.tokenizers import tiny_tokenizer


def refusal(capfd, argv: list[str]) -> str:
    """The one line on standard error of a command that must exit with status 2."""
    capfd.readouterr()
    assert main(argv) == 2
    captured = capfd.readouterr()
    (line,) = after_device(captured.err).splitlines()
    assert captured.out == ""
    return line


def lines(folder: Path, name: str) -> list[dict]:
    return [json.loads(line) for line in (folder / "predictions" / f"{name}.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def whole(inputs):
    """Base, two adapters and a merged checkpoint, by the command."""
    out = inputs / "whole"
    models = [
        "--adapter",
        inputs / "one" / "adapter",
        f"other={inputs / 'two' / 'adapter'}",
        "--merged",
        inputs / "merged",
    ]
    argv = arguments(inputs, *models, "--metrics", "loss,chrf", "--metrics", "exact_match,regex=a{1,2}")
    assert main([*argv, "--max-new-tokens", "6", "--batch-size", "3", "--output_dir", str(out)]) == 0
    return out


def test_the_loss_of_every_row_is_its_own(inputs, whole):
    model = Checkpoint.open(inputs / "base").load_model(dtype=jnp.float32)
    lora = load_adapter(inputs / "one" / "adapter", model)
    data = DataSection(train=str(inputs / "chats.jsonl"), max_length=32, packing=False)
    rows = prepare_data(data, tiny_tokenizer(), seed=0).train
    results = json.loads((whole / "results.json").read_text())
    alone = nnx.jit(loss)
    for name, adapter in (("base", None), ("one", lora)):
        total = 0.0
        found = {line["id"]: line for line in lines(whole, name)}
        assert sorted(found) == list(range(ROWS))
        for row, (ids, mask) in enumerate(rows):
            padded = {"input_ids": ids, "loss_mask": mask, "attention_mask": np.ones_like(ids)}
            batch = {key: np.pad(x, (0, 32 - len(ids)))[None] for key, x in padded.items()}
            expected = float(alone(model, adapter, batch))
            assert found[row]["scores"]["loss"] == pytest.approx(expected, rel=1e-5)
            assert found[row]["scores"]["target_tokens"] == mask.sum()
            total += expected * mask.sum()
        figures = results["models"][name]
        mean = total / sum(int(mask.sum()) for _, mask in rows)
        assert figures["loss"]["value"] == pytest.approx(mean, rel=1e-5)
        assert figures["perplexity"]["value"] == pytest.approx(math.exp(mean), rel=1e-4)
        assert figures["loss"]["low"] < figures["loss"]["value"] < figures["loss"]["high"]


def test_all_models_are_measured_in_one_call(inputs, whole):
    results = json.loads((whole / "results.json").read_text())
    assert list(results["models"]) == ["base", "one", "other", "merged"]
    names = ["loss", "perplexity", "token_accuracy", "chrf", "exact_match", "regex_match"]
    assert all(list(figures) == names for figures in results["models"].values())
    base, one, merged = (results["models"][name] for name in ("base", "one", "merged"))
    assert base["loss"]["difference"] is None
    assert one["loss"]["difference"] == pytest.approx(one["loss"]["value"] - base["loss"]["value"])
    assert one["loss"]["difference_low"] < one["loss"]["difference"] < one["loss"]["difference_high"]
    assert 0 < one["loss"]["p_value"] <= 1
    assert merged["loss"]["value"] == pytest.approx(one["loss"]["value"], rel=1e-5)
    assert one["loss"]["value"] != pytest.approx(base["loss"]["value"], rel=1e-2)
    assert [a["answer"] for a in lines(whole, "merged")] == [a["answer"] for a in lines(whole, "one")]
    assert {a["answer"] for a in lines(whole, "one")} != {a["answer"] for a in lines(whole, "base")}
    assert "predictions" not in results
    assert results["command"]
    assert (whole / "report.html").read_text().startswith("<!DOCTYPE html>")


def test_a_prediction_says_what_was_asked_and_answered(inputs, whole):
    chats = [json.loads(line)["messages"] for line in (inputs / "chats.jsonl").read_text().splitlines()]
    for line in lines(whole, "other"):
        user, assistant = chats[line["id"]]
        assert line["prompt"] == f"<|user|>{user['content']}<|end|><|assistant|>"
        assert line["reference"] == assistant["content"]
        assert line["finish_reason"] in ("stop", "length")
        assert line["scores"]["exact_match"] == (line["answer"].strip() == line["reference"])
        assert line["scores"]["regex_match"] == ("a" in line["answer"])


def test_without_more_it_tells_the_one_models_loss(inputs, whole, capfd):
    expected = json.loads((whole / "results.json").read_text())["models"]["one"]
    argv = arguments(inputs, "--adapter", inputs / "one" / "adapter")
    assert main([*argv, "--json"]) == 0
    found = json.loads(capfd.readouterr().out)
    for name in ("loss", "perplexity", "token_accuracy"):
        assert found[f"eval_{name}"] == pytest.approx(expected[name]["value"], rel=1e-6)
    assert found["rows"] == ROWS
    assert main(argv) == 0
    assert f"loss            {found['eval_loss']:.4f}\n" in capfd.readouterr().out


@pytest.mark.parametrize("sampled", [False, True], ids=["greedy", "sampled"])
def test_what_was_interrupted_goes_on(sampled, inputs, tmp_path, monkeypatch):
    settings = {"do_sample": True, "temperature": 2.0, "seed": 3} if sampled else {}
    expected = run(inputs, tmp_path / "at once", **settings)
    asked = []
    answer_prompts = predict.answer_prompts

    def failing(model, tokenizer, prompts, **rest):
        asked.append(len(prompts))
        for number, found in enumerate(answer_prompts(model, tokenizer, prompts, **rest)):
            if len(asked) == 2 and number == 4:
                raise OSError("the power is gone")
            yield found

    monkeypatch.setattr(predict, "answer_prompts", failing)
    out = tmp_path / "in parts"
    with pytest.raises(OSError, match="power"):
        run(inputs, out, **settings)
    assert [len(lines(out, name)) for name in ("base", "one")] == [ROWS, 4]
    assert not (out / "results.json").exists()
    file = out / "predictions" / "one.jsonl"
    with file.open("ab") as opened:
        opened.write(file.read_bytes()[:50])  # a line that was being written
    again = run(inputs, out, **settings)
    assert asked == [ROWS, ROWS, ROWS - 4]
    assert {line["id"] for line in lines(out, "one")} == set(range(ROWS))
    for name in ("base", "one"):
        texts = [[p.answer for p in results.predictions[name]] for results in (expected, again)]
        assert texts[0] == texts[1]
        for figure, found in again.models[name].items():
            assert found.value == pytest.approx(expected.models[name][figure].value, rel=1e-6)
    # Complete: nothing is computed, nor loaded, again.
    monkeypatch.setattr("phi3_jax.evaluate.run._load", None)
    assert run(inputs, out, **settings).models == again.models


def data(folder: Path, *rows: object) -> list[str]:
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return ["--data", str(file)]


def messages(*turns: tuple[str, str]) -> dict:
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def other_base(folder: Path) -> list[str]:
    model = tiny_model(1, hidden_size=48)
    save_adapter(folder / "adapter", random_lora(model), base_model_name_or_path="other")
    return ["--adapter", str(folder / "adapter")]


def without_the_role(folder: Path) -> list[str]:
    base = write_checkpoint(folder / "base")
    template = (
        "{% for m in messages %}{% if m['role'] != 'tool' %}{{ '<|' + m['role'] + '|>' + m['content'] + '<|end|>' }}"
    )
    (base / "chat_template.jinja").write_text(template + "{% endif %}{% endfor %}")
    return ["--model", str(base), *data(folder, messages(("user", "a"), ("tool", "b"), ("assistant", "c")))]


def outgrown(folder: Path) -> list[str]:
    base = write_outgrown_checkpoint(folder / "base")
    return ["--model", str(base), *data(folder, messages(("user", "a<call>"), ("assistant", "b")))]


BAD = {
    "an empty set": (lambda f: data(f), ["rows.jsonl", "no usable rows"]),
    "no answer": (lambda f: data(f, messages(("user", "a"))), ["row 1", "no assistant turn"]),
    "no reference": (
        lambda f: [*data(f, {"text": "abc"}), "--loss-on", "all", "--metrics", "loss,rouge"],
        ["rouge needs a reference", "1 of 1 rows", "row 1"],
    ),
    "no number": (lambda f: ["--metrics", "gsm8k"], ["gsm8k", "row 1", "no number"]),
    "an unknown metric": (lambda f: ["--metrics", "loss,blue"], ["'blue'", "did you mean bleu?"]),
    "a pattern": (lambda f: ["--metrics", "regex=("], ["'('", "no regular expression"]),
    "a schema": (lambda f: ["--metrics", "json_schema=absent.json"], ["absent.json", "cannot be read"]),
    "another base": (other_base, ["adapter_model.safetensors", "do not fit"]),
    "a long prompt": (
        lambda f: ["--metrics", "exact_match", "--max-new-tokens", "4090"],
        ["row 1: its prompt has", "max_new_tokens 4090"],
    ),
    "a cut prompt": (
        lambda f: [
            *data(f, messages(("user", "a" * 40), ("assistant", "b"))),
            *["--loss-on", "all", "--metrics", "exact_match"],
        ],
        ["row 1: its prompt is longer than data.max_length 32"],
    ),
    "a token": (outgrown, [f"rows.jsonl, row 1: {OUTGROWN_ERROR}"]),
    "no tool call": (
        lambda f: ["--metrics", "loss,tool_call"],
        [f"metric tool_call: none of the {ROWS} references", "give rows with calls"],
    ),
    "turns and what is trained on": (
        lambda f: ["--turns", "all", "--loss-on", "last"],
        ["turns is all, and data.loss_on last"],
    ),
    "a role": (without_the_role, ["rows.jsonl, row 1, turn 2", "no place for role 'tool'"]),
    "no data": (lambda f: ["--data", "absent.jsonl"], ["absent.jsonl"]),
    "no adapter": (lambda f: ["--adapter", "no/such/folder"], ["no/such/folder"]),
    "no checkpoint": (lambda f: ["--merged", str(f)], ["config.json"]),
    "the same name twice": (lambda f: ["--adapter", "base=x"], ["two models are named base"]),
    "a temperature": (lambda f: ["--metrics", "bleu", "--temperature", "-1"], ["temperature is -1"]),
    "devices": (lambda f: ["--parallel.data", "3"], ["data 3", "divide"]),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_told_in_one_line_and_nothing_is_written(case, inputs, tmp_path, capfd, monkeypatch):
    make, words = BAD[case]
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    out = tmp_path / "out"
    line = refusal(capfd, [*arguments(inputs, "--output_dir", out), *make(tmp_path)])
    assert [word for word in words if word not in line] == []
    assert not out.exists()


def test_a_loss_that_is_not_finite_is_an_error(inputs, tmp_path):
    model = Checkpoint.open(inputs / "base").load_model(dtype=jnp.float32)
    lora = jax.tree.map(lambda x: x * 1e30, random_lora(model))
    save_adapter(tmp_path / "adapter", lora, base_model_name_or_path="base")
    with pytest.raises(InputError, match=r"adapter.*: the loss of row \d+ is not finite"):
        evaluate(inputs / "base", inputs / "chats.jsonl", adapters={"adapter": tmp_path / "adapter"})


def test_names(tmp_path):
    assert name_models("out/demo/adapter") == {"demo": "out/demo/adapter"}
    assert name_models(["a=x/y", tmp_path / "b c"]) == {"a": "x/y", "b_c": str(tmp_path / "b c")}
    (tmp_path / "r=8").mkdir()
    assert name_models([tmp_path / "r=8"]) == {"r_8": str(tmp_path / "r=8")}
    assert name_models({"x": Path("y")}) == {"x": "y"}
    with pytest.raises(InputError, match="both named x; give names"):
        name_models(["a/x", "b/x"])


def test_a_merged_checkpoint_of_another_vocabulary_is_refused(inputs, tmp_path):
    folder = shutil.copytree(inputs / "base", tmp_path / "merged")
    tiny_model(1, vocab_size=20).save_pretrained(str(folder))
    message = r"small: .*chats.jsonl, row \d+: token '.' has id \d+, and the model's embedding has 20 rows"
    with pytest.raises(InputError, match=message):
        evaluate(inputs / "base", inputs / "chats.jsonl", merged={"small": folder})


def test_tool_calls_are_compared_row_by_row_with_the_bases(inputs, tmp_path, monkeypatch, capfd):
    """The models' answers are given: what they are measured by is looked at here."""
    calls = [f'{{"name": "find", "arguments": {{"q": "{word}"}}}}' for word in "abcde"]
    rows = [messages(("user", word), ("assistant", call)) for word, call in zip("abcde", calls, strict=True)]
    rows.append(messages(("user", "f"), ("assistant", "no call")))
    by_one = [f"<tool_call>{call}</tool_call>" for call in calls[:4]]
    answered = iter([["I do not know"] * 6, [*by_one, calls[0], "no"]])

    def answer(*arguments, **rest):
        for row, text in enumerate(next(answered)):
            yield row, Answer(text, (), (), "stop")

    monkeypatch.setattr(predict, "answer_prompts", answer)
    out = tmp_path / "out"
    options = ["--adapter", inputs / "one" / "adapter", "--max-length", "96", "--output", out]
    assert main([*arguments(inputs, *options, "--metrics", "tool_call,loss"), *data(tmp_path, *rows)]) == 0
    table = capfd.readouterr().out
    assert [name for name in ("tool call ", "tool call name", "tool call row") if name not in table] == []
    assert "note: tool_call: 5 of 6 references make a tool call" in table
    results = json.loads((out / "results.json").read_text())["models"]
    assert list(results["one"])[:4] == ["tool_call", "tool_call_name", "tool_call_row", "loss"]
    expected = {"tool_call": (0, 4 / 5), "tool_call_name": (0, 1), "tool_call_row": (1 / 6, 5 / 6)}
    for name, (base, one) in expected.items():
        found = results["one"][name]
        assert (results["base"][name]["value"], found["value"]) == (base, one)
        assert found["difference"] == pytest.approx(one - base)
        assert found["difference_low"] <= found["difference"] <= found["difference_high"]
        assert 0 < found["p_value"] <= 1
    assert results["one"]["tool_call_row"]["low"] < 5 / 6 < results["one"]["tool_call_row"]["high"]
    assert "Rows with the right tool calls" in (out / "report.html").read_text()
    scores = lines(out, "one")[4]["scores"]
    assert (scores["tool_call_row"], scores["tool_calls_right"], scores["tool_calls_named"]) == (0, 0, 1)


def test_every_turn_of_a_conversation_is_answered_on_request(inputs, tmp_path):
    turns = ("user", "abc"), ("assistant", "b"), ("user", "c a"), ("assistant", "a b"), ("user", "a")
    file = data(tmp_path, messages(*turns[:4]), messages(*turns, ("assistant", "c")))[1]
    last, every = (
        evaluate(inputs / "base", file, metrics="loss,exact_match", turns=which, max_new_tokens=2)
        for which in ("last", "all")
    )
    asked = [(prediction.prompt, prediction.reference) for prediction in every.predictions["base"]]
    assert [reference for _, reference in asked] == ["b", "a b", "b", "a b", "c"]
    assert asked[1][0] == "<|user|>abc<|end|><|assistant|>b<|end|><|user|>c a<|end|><|assistant|>"
    assert [asked[1], asked[4]] == [(each.prompt, each.reference) for each in last.predictions["base"]]
    assert (last.data["rows"], every.data["rows"]) == (2, 5)
    assert "each of 5 assistant turns of 2 rows is a row here" in str(every.data["notices"])
    # The targets are the same ones, after the same tokens.
    assert every.data["target_tokens"] == last.data["target_tokens"]
    assert every.models["base"]["loss"].value == pytest.approx(last.models["base"]["loss"].value, rel=1e-5)


def test_tool_calls_are_looked_for_in_every_turn(inputs, tmp_path):
    call = '{"name": "b", "arguments": {}}'
    file = data(tmp_path, messages(("user", "a"), ("assistant", "a b"), ("user", "c"), ("assistant", call)))[1]
    for turns, expected in ((None, ["a b", call]), ("last", [call])):
        found = evaluate(inputs / "base", file, metrics="tool_call", turns=turns, max_new_tokens=2)
        assert [prediction.reference for prediction in found.predictions["base"]] == expected


def test_a_folder_in_use_is_refused_to_others(inputs, tmp_path, monkeypatch):
    answer_prompts, refused = predict.answer_prompts, []

    def answer_and_start_another(*arguments, **rest):
        with monkeypatch.context() as patch:
            patch.setattr("phi3_jax.evaluate.run._load", None)  # it does not come so far
            with pytest.raises(InputError) as error:
                run(inputs, tmp_path / "out")
        refused.append(str(error.value))
        return answer_prompts(*arguments, **rest)

    monkeypatch.setattr(predict, "answer_prompts", answer_and_start_another)
    run(inputs, tmp_path / "out")
    assert len(refused) == 2
    assert refused[0].startswith(f"{tmp_path}/out: another run is writing there (process {os.getpid()} on ")
    assert refused[0].endswith("wait for it, or name another output_dir")
    assert not (tmp_path / "out" / "run.lock").exists()


@pytest.mark.parametrize(("blocks", "file"), [(0, "config.yaml"), (2, "predictions/base.jsonl"), (3, "results.json")])
def test_a_full_disk_is_told_and_the_evaluation_goes_on(blocks, file, inputs, small_disk, tmp_path, capfd):
    """`blocks` of the disk are free, of which run.lock takes one, and `file` is the one that finds no more."""
    argv = arguments(inputs, "--metrics", "chrf", "--max-new-tokens", 6, "--batch-size", 2, "--output_dir")
    assert main([*argv, str(tmp_path / "out")]) == 0
    filler, output = small_disk / "filler", small_disk / "out"
    with filler.open("wb") as opened:
        os.posix_fallocate(opened.fileno(), 0, 3 * 2**20 - blocks * 4096)
    line = refusal(capfd, [*argv, str(output)])
    assert line.startswith(f"phi3-jax: {output}/{file}: cannot be written (No space left on device)")
    filler.unlink()
    assert main([*argv, str(output)]) == 0
    name = "predictions/base.jsonl"
    assert (output / name).read_text() == (tmp_path / "out" / name).read_text()
    assert sorted(path.name for path in output.iterdir()) == sorted(path.name for path in (tmp_path / "out").iterdir())
