"""Whole runs of the variants: what was trained is what the exported adapter does to the untouched base."""

import json

import pytest

from phi3_jax.cli import main
from phi3_jax.training.loop import train
from tests.helpers.runs import cut_off, metrics, run_config, same_run, write_inputs

VARIANTS = {
    "dora, saved head, tokens and ranks": {
        "peft": {
            "target_modules": ["qkv_proj", "down_proj"],
            "use_dora": True,
            "modules_to_save": ["lm_head"],
            "trainable_token_indices": [3, 5],
            "rank_pattern": {"down_proj": 4},
        },
        "training": {"optim": "adamw_8bit"},
    },
    "pissa on slices": {
        "peft": {"target_modules": ["v_proj", "up_proj", "o_proj"], "init_lora_weights": "pissa_niter_4", "r": 4},
        "training": {"loraplus_lr_ratio": 4.0},
    },
    "eva": {"peft": {"init_lora_weights": "eva", "r": 4, "target_modules": "all-linear"}},
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return write_inputs(tmp_path_factory.mktemp("variants"))


def settings(name, **training):
    few = {
        "max_steps": 4,
        "save_steps": 2,
        "eval_steps": 2,
        "eval_generations": 0,
        **VARIANTS[name].get("training", {}),
        **training,
    }
    return {"peft": VARIANTS[name]["peft"], "training": few}


@pytest.mark.parametrize("name", VARIANTS)
def test_the_exported_adapter_is_what_was_trained(name, inputs, capsys):
    folder = name.replace(", ", "_").replace(" ", "_")
    train(run_config(inputs, folder, **settings(name)))
    out = inputs / folder
    losses = {row["step"]: row["eval_loss"] for row in metrics(out) if "eval_loss" in row}
    assert losses[4] < losses[0] - 0.01
    capsys.readouterr()
    base = ["--model", str(inputs / "base"), "--dtype", "float32", "--metrics", "loss"]
    adapters = ["--adapter", f"4={out}", "--adapter", f"2={out / 'checkpoints' / '2'}"]
    assert (
        main(["evaluate", *base, *adapters, "--data", str(inputs / "eval.jsonl"), "--max-length", "32", "--json"]) == 0
    )
    evaluated = json.loads(capsys.readouterr().out)["models"]
    for step in (2, 4):
        assert evaluated[str(step)]["loss"]["value"] == pytest.approx(losses[step], rel=1e-5)


def test_a_start_from_the_weights_is_resumed_bit_for_bit(inputs, monkeypatch):
    """PiSSA's constant start is in no checkpoint: it is computed again."""
    name = "pissa on slices"
    train(run_config(inputs, "whole", **settings(name)))
    cut_off(run_config(inputs, "cut", **settings(name)), 3, monkeypatch)
    train(run_config(inputs, "cut", **settings(name, resume_from_checkpoint=True)))
    same_run(inputs / "whole", inputs / "cut")
