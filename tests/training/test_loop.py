"""Whole runs on a tiny checkpoint: what they write, when they stop, what they refuse."""

import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml

from phi3_jax import InputError, Phi3ForCausalLM
from phi3_jax.config.run import RunConfig
from phi3_jax.data import eval_batches
from phi3_jax.peft.adapter import load_adapter
from phi3_jax.system.reading import read_yaml
from phi3_jax.training import checks, evaluation, loop
from phi3_jax.training.loop import train
from phi3_jax.training.step import make_eval_step
from tests.helpers.runs import cut_off, metrics, run_config, weights, write_inputs


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    return write_inputs(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def finished(inputs) -> tuple[RunConfig, dict]:
    run = run_config(inputs, "finished", logging={"tensorboard": True})
    return run, train(run)


def test_a_run_writes_its_files(inputs, finished):
    run, everything = finished
    out = Path(run.training.output_dir)
    names = {"config.yaml", "versions.json", "metrics.jsonl"}
    names |= {"train_results.json", "eval_results.json", "all_results.json"}
    assert {p.name for p in out.iterdir()} == names | {"report.html", "checkpoints", "adapter", "tensorboard"}
    assert RunConfig.from_dict(yaml.safe_load((out / "config.yaml").read_text())) == run
    assert json.loads((out / "all_results.json").read_text()) == everything
    both = [json.loads((out / f"{name}_results.json").read_text()) for name in ("train", "eval")]
    assert both[0] | both[1] == everything
    assert everything.keys() >= {"train_loss", "epoch", "eval_loss", "eval_perplexity", "exact_match"}
    adapter = json.loads((out / "adapter" / "adapter_config.json").read_text())
    assert adapter["base_model_name_or_path"] == str(inputs / "base")
    assert (out / "adapter" / "tokenizer.json").exists()
    assert list((out / "tensorboard").glob("events*"))
    # 13 rows of 2 to 25 tokens, packed
    assert everything["epoch"] == 6 / loop.Trainer(run, loop.load_job(run)).epoch_steps


def test_the_lines_of_metrics(finished):
    run, everything = finished
    rows = metrics(Path(run.training.output_dir))
    assert [row["step"] for row in rows if "loss" in row] == [2, 4, 6]
    assert [row["step"] for row in rows if "eval_loss" in row] == [0, 3, 6]
    for row in rows:
        if "loss" in row:
            names = {"step", "loss", "learning_rate", "grad_norm", "tokens", "target_tokens", "tokens_per_second"}
            assert row.keys() >= names
        else:
            assert row["eval_perplexity"] == pytest.approx(math.exp(row["eval_loss"]))
    logged = [row for row in rows if "loss" in row]
    assert logged[0]["tokens"] < logged[1]["tokens"] < logged[2]["tokens"]
    assert everything["eval_loss"] == rows[-1]["eval_loss"] < rows[0]["eval_loss"]


def test_the_adapter_is_the_one_that_was_evaluated(inputs, finished):
    run, everything = finished
    model = Phi3ForCausalLM.from_pretrained(str(inputs / "base"), dtype=jnp.float32)
    lora = load_adapter(Path(run.training.output_dir) / "adapter", model)
    job = loop.load_job(run)
    total = count = 0.0
    for ids, mask in job.data.eval_sets["eval"]:  # row by row, neither packed nor padded
        logits = jax.nn.log_softmax(model(jnp.asarray(ids)[None], lora=lora)[0])
        picked = np.asarray(logits)[np.arange(len(ids) - 1), ids[1:]]
        total -= float((picked * mask[1:]).sum())
        count += int(mask[1:].sum())
    assert everything["eval_loss"] == pytest.approx(total / count, rel=1e-5)


@pytest.mark.slow
def test_evaluation_sets_with_names_have_figures_of_their_own(inputs):
    """Each is what a run with that set alone measures."""
    chats, held_out = (str(inputs / f"{name}.jsonl") for name in ("chats", "eval"))
    alone = {
        name: train(run_config(inputs, f"only_{name}", data={"eval": file}))
        for name, file in (("chats", chats), ("other", held_out))
    }
    named = {"eval": {"chats": chats, "other": held_out}}
    everything = train(run_config(inputs, "all_named", data=named))
    for name, figures in alone.items():
        for figure in ("loss", "perplexity", "token_accuracy", "loss_interval"):
            assert everything[f"eval_{name}_{figure}"] == figures[f"eval_{figure}"]
    rows = metrics(inputs / "all_named")
    assert [row["step"] for row in rows if "eval_chats_loss" in row] == [0, 3, 6]
    losses = [everything[f"eval_{name}_loss"] for name in alone]
    assert min(losses) < everything["eval_loss"] < max(losses)
    assert "Loss of chats" in (inputs / "all_named" / "report.html").read_text()
    unpacked = train(run_config(inputs, "unpacked", data={**named, "eval_packing": False}))
    assert unpacked["eval_chats_loss"] == pytest.approx(everything["eval_chats_loss"], rel=1e-5)
    assert unpacked["eval_chats_loss_interval"] != everything["eval_chats_loss_interval"]  # of rows, not of sequences
    with pytest.raises(InputError, match="data.eval"):
        train(run_config(inputs, "all_named", training={"resume_from_checkpoint": True}))


def test_full_finetuning_writes_a_model(inputs):
    run = run_config(inputs, "full", peft={"full_finetuning": True}, model={"dtype": "bfloat16"})
    everything = train(run)
    out = Path(run.training.output_dir)
    assert not (out / "adapter").exists()
    assert (out / "model" / "tokenizer.json").exists()
    model = Phi3ForCausalLM.from_pretrained(str(out / "model"), dtype=jnp.bfloat16)
    job = loop.load_job(run_config(inputs, "unused", model={"name_or_path": str(out / "model"), "dtype": "bfloat16"}))
    step = make_eval_step(job.graph, job.dtype)
    batches = eval_batches(job.data.eval_sets["eval"], run.data, batch_size=4, pad_id=0)
    again = evaluation.evaluate_rows(step, job.trainable, job.frozen, {"eval": batches})
    assert model.dtype == jnp.bfloat16
    # The same bfloat16 weights; XLA may round the products in between differently.
    assert again["eval_loss"] == pytest.approx(everything["eval_loss"], rel=1e-3)


def test_epochs_and_their_ends(inputs):
    settings = {"max_steps": -1, "num_train_epochs": 1.5, "eval_strategy": "epoch", "save_strategy": "epoch"}
    run = run_config(inputs, "epochs", training={**settings, "eval_steps": None})
    everything = train(run)
    out = Path(run.training.output_dir)
    epoch = loop.Trainer(run, loop.load_job(run)).epoch_steps
    total = math.ceil(1.5 * epoch)
    assert everything["global_step"] == total
    assert [row["step"] for row in metrics(out) if "eval_loss" in row] == [0, epoch, total]
    assert sorted(int(p.name) for p in (out / "checkpoints").iterdir()) == [epoch, total]


def test_a_dictionary_is_no_run_and_the_line_says_what_makes_one():
    with pytest.raises(InputError, match=r"takes a RunConfig, not \{'model': 1\}; RunConfig.from_dict makes one"):
        train({"model": 1})


def test_starting_from_an_adapter(inputs, finished):
    first = Path(finished[0].training.output_dir) / "adapter"
    settings = {"learning_rate": 0.0, "save_strategy": "no"}
    run = run_config(inputs, "continued", peft={"init_from": str(first)}, training=settings)
    everything = train(run)
    assert everything["eval_loss"] == pytest.approx(finished[1]["eval_loss"], rel=1e-6)
    assert weights(Path(run.training.output_dir) / "adapter") == weights(first)


def test_a_loss_that_is_not_finite_stops_the_run(inputs):
    settings = {"learning_rate": 1e30, "optim": "sgd", "max_grad_norm": 0.0, "warmup_ratio": 0.0, "logging_steps": 1}
    run = run_config(inputs, "nan", training={**settings, "save_steps": 1, "eval_steps": None})
    with pytest.raises(FloatingPointError, match=r"not finite.*learning_rate"):
        train(run)
    # Of step 1 alone: what came after was skipped.
    assert [p.name for p in (Path(run.training.output_dir) / "checkpoints").iterdir()] == ["1"]


def test_an_output_folder_that_holds_a_run(inputs, finished):
    run, _ = finished
    out = Path(run.training.output_dir)
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*")}
    with pytest.raises(InputError, match="already holds a run"):
        train(run)
    assert {p: p.stat().st_mtime_ns for p in out.rglob("*")} == before


def test_overwriting_a_run(inputs):
    short = {"max_steps": 1, "eval_strategy": "no", "eval_steps": None}
    out = inputs / "again"
    out.mkdir()
    for name in ("metrics.jsonl", "report.html"):
        (out / name).write_text("old")
    (out / "checkpoints" / "7").mkdir(parents=True)
    (out / "notes.txt").write_text("mine")
    train(run_config(inputs, "again", training={**short, "overwrite_output_dir": True}))
    assert [row["step"] for row in metrics(out)] == [1]
    assert [p.name for p in (out / "checkpoints").iterdir()] == ["1"]
    assert (out / "notes.txt").read_text() == "mine"
    assert (out / "report.html").read_text() != "old"


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"data": {"train": None}}, "data.train is not set"),
        ({"data": {"train": "no/such/file.jsonl"}}, "no such"),
        ({"model": {"name_or_path": "no/such/folder/at/all"}}, "no such folder"),
        ({"peft": {"target_modules": ["query"]}}, "qkv_proj"),
    ],
)
def test_bad_input_leaves_nothing_behind(inputs, sections, message):
    with pytest.raises(InputError, match=message):
        train(run_config(inputs, "bad", **sections))
    assert not (inputs / "bad").exists()


def test_wandb_that_is_not_installed(inputs, monkeypatch):
    monkeypatch.setattr(checks, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="pip install wandb"):
        train(run_config(inputs, "bad", logging={"wandb": True}))
    assert not (inputs / "bad").exists()


def test_rows_longer_than_the_models_positions_are_refused(tmp_path):
    inputs = write_inputs(tmp_path)
    path = inputs / "base" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"max_position_embeddings": 16}))
    with pytest.raises(InputError, match="the model has 16 positions; set data.max_length 16"):
        train(run_config(inputs, training={"max_steps": 1, "eval_strategy": "no"}))


def test_the_first_row_is_shown(tmp_path, capsys):
    inputs = write_inputs(tmp_path)
    train(run_config(inputs, training={"max_steps": 1, "eval_strategy": "no"}))
    assert "⟦" in capsys.readouterr().out


@pytest.mark.parametrize("warmup_ratio", [0.03, 0.0])
def test_a_step_that_can_learn_nothing_is_told(warmup_ratio, inputs, capsys):
    training = {"max_steps": 1, "eval_strategy": "no", "warmup_ratio": warmup_ratio}
    train(run_config(inputs, f"warmup {warmup_ratio}", training=training))
    said = capsys.readouterr().out
    assert ("the only step has learning rate 0" in said) == (warmup_ratio > 0)


def test_rows_in_memory_are_said_to_be_there_and_given_again_to_resume(inputs, monkeypatch, capsys):
    rows, held_out = ([{"prompt": f"{n} a", "completion": "a"} for n in numbers] for numbers in (range(9), range(2)))
    settings = {"max_steps": 2, "eval_steps": 2, "save_steps": 1, "resume_from_checkpoint": True}
    run = run_config(inputs, "memory", data={"train": None, "eval": None}, training=settings)
    cut_off(run, 1, monkeypatch, train_dataset=rows, eval_dataset=iter(held_out))
    written = RunConfig.from_dict(read_yaml(inputs / "memory" / "config.yaml"))
    assert written.data.train == "train_dataset, in memory"
    with pytest.raises(InputError, match="data.train says that the rows were given in memory"):
        train(written)
    with pytest.raises(InputError, match=r"other training rows, .*\(of rows in memory, the same in the same order\)"):
        train(written, train_dataset=rows[::-1], eval_dataset=held_out)
    results = train(written, train_dataset=(row for row in rows), eval_dataset=held_out)
    assert (results["global_step"], results["train_samples"]) == (2, 9)
    assert "resuming at step 1" in capsys.readouterr().out
    assert "train_dataset, in memory" in (inputs / "memory" / "report.html").read_text()
