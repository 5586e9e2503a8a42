"""Runs on a quantised base: trained, cut off and resumed, evaluated, merged into the unquantised base."""

import json
import os
import shutil
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from phi3_jax import InputError
from phi3_jax.cli import main
from phi3_jax.config.run import parse_run_config
from phi3_jax.hf.checkpoint import Checkpoint
from phi3_jax.hf.save import save_model
from phi3_jax.peft.adapter import load_adapter
from phi3_jax.quant import quantize_model
from phi3_jax.training.loop import train
from tests.helpers.commands import after_device
from tests.helpers.runs import cut_off, metrics, run_config, same_run, write_inputs

NF4 = {"model": {"quantization": "nf4"}}
SHORT = {"max_steps": 4, "save_steps": 2, "eval_steps": 2, "eval_generations": 1}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    return write_inputs(tmp_path_factory.mktemp("qlora"))


@pytest.fixture(scope="module")
def finished(inputs) -> dict:
    return train(run_config(inputs, "out", **NF4, training=SHORT))


def test_a_run_trains_on_the_quantised_base(inputs, finished):
    losses = [row["loss"] for row in metrics(inputs / "out") if "loss" in row]
    assert np.isfinite(losses).all()
    before, *_, after = [row["eval_loss"] for row in metrics(inputs / "out") if "eval_loss" in row]
    assert after < before


def test_resuming_continues_bit_for_bit(inputs, finished, monkeypatch):
    cut_off(run_config(inputs, "cut", **NF4, training=SHORT), 3, monkeypatch)
    train(run_config(inputs, "cut", **NF4, training=SHORT | {"resume_from_checkpoint": True}))
    same_run(inputs / "out", inputs / "cut")


def test_a_base_that_is_quantised_on_disk_trains_alike(inputs, finished):
    folder = inputs / "quantised"
    shutil.copytree(inputs / "base", folder)
    save_model(quantize_model(Checkpoint.open(inputs / "base").load_model(dtype=jnp.float32), "nf4"), folder)
    train(run_config(inputs, "alike", model={"name_or_path": str(folder)}, training=SHORT))
    name = "adapter/adapter_model.safetensors"
    one, other = load_file(inputs / "out" / name), load_file(inputs / "alike" / name)
    assert all(np.array_equal(one[key], other[key]) for key in one)


def test_evaluate_and_generate_from_the_command_line(inputs, finished, capsys):
    common = ["--model", inputs / "base", "--adapter", inputs / "out" / "adapter"]

    def eval_loss(*more) -> float:
        assert main(list(map(str, ["evaluate", *common, "--data", inputs / "eval.jsonl", "--json", *more]))) == 0
        return json.loads(capsys.readouterr().out.splitlines()[-1])["eval_loss"]

    assert eval_loss("--quantization", "nf4") == pytest.approx(finished["eval_loss"], rel=1e-5)
    assert eval_loss() != pytest.approx(finished["eval_loss"], rel=1e-3)
    argv = ["generate", *common, "--quantization", "int8", "--prompt", "abc", "--max-new-tokens", "3"]
    assert main(list(map(str, argv))) == 0


def test_merging_goes_into_the_unquantised_base(inputs, finished, capfd):
    adapter = inputs / "out" / "adapter"
    assert main(["export", str(adapter), "--merge", "--output", str(inputs / "merged")]) == 0
    merged = Checkpoint.open(inputs / "merged").load_model(dtype=jnp.float32)
    base = Checkpoint.open(inputs / "base").load_model(dtype=jnp.float32)
    part = load_adapter(adapter, base).adapters["model"]["layers"]["mlp"]["down_proj"]
    expected = base.model.layers.mlp.down_proj.weight[...] + part.scaling * part.lora_B @ part.lora_A
    assert np.allclose(merged.model.layers.mlp.down_proj.weight[...], expected, rtol=1e-5, atol=1e-6)

    quantised = inputs / "quantised to merge"
    save_model(quantize_model(base, "nf4"), quantised)
    capfd.readouterr()
    argv = ["export", adapter, "--merge", "--base", quantised, "--output", inputs / "no"]
    assert main(list(map(str, argv))) == 2
    (line,) = after_device(capfd.readouterr().err).splitlines()
    assert "give the unquantised checkpoint with --base" in line
    assert not (inputs / "no").exists()


class TestRefusals:
    def test_full_finetuning(self, inputs):
        with pytest.raises(InputError, match=r"model.quantization is nf4, but peft.full_finetuning"):
            run_config(inputs, **NF4, peft={"full_finetuning": True})

    def test_full_finetuning_of_a_base_quantised_on_disk(self, inputs, tmp_path):
        folder = shutil.copytree(inputs / "base", tmp_path / "base")
        save_model(quantize_model(Checkpoint.open(folder).load_model(dtype=jnp.float32), "int8"), folder)
        run = run_config(inputs, "full", model={"name_or_path": str(folder)}, peft={"full_finetuning": True})
        with pytest.raises(InputError, match="its weights are quantised"):
            train(run)
        assert not os.path.exists(inputs / "full")

    @pytest.mark.parametrize("value", ["nf5", "4bit", "true"])
    def test_other_kinds(self, inputs, value):
        with pytest.raises(InputError, match=r"model.quantization is .*expected one of none, nf4, int8"):
            run_config(inputs, model={"quantization": value})


BNB = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}


def parsed(model: dict):
    run, notices = parse_run_config({"model": {"name_or_path": "x", **model}, "data": {"train": "x"}})
    return run.model, notices


class TestNames:
    """Settings of a BitsAndBytesConfig, in a dictionary of their own or in the section itself."""

    @pytest.mark.parametrize(
        ("model", "expected"),
        [
            ({"quantization_config": BNB}, ("nf4", True, "bfloat16")),
            (BNB, ("nf4", True, "bfloat16")),
            ({**BNB, "bnb_4bit_use_double_quant": False}, ("nf4", False, "bfloat16")),
            ({"load_in_4bit": "true"}, ("nf4", False, "bfloat16")),  # TRL's defaults
            ({"load_in_4bit": True, "use_bnb_nested_quant": True}, ("nf4", True, "bfloat16")),
            ({**BNB, "bnb_4bit_compute_dtype": "float32"}, ("nf4", True, "float32")),
            ({**BNB, "bnb_4bit_compute_dtype": "torch.float16"}, ("nf4", True, "float16")),
            ({"quantization_config": {"load_in_8bit": True}}, ("int8", True, "bfloat16")),
            ({"quantization_config": None, "load_in_4bit": False}, (None, True, "bfloat16")),
            ({"quantization_config": str(BNB)}, ("nf4", True, "bfloat16")),
        ],
    )
    def test_mean_what_they_mean_there(self, model, expected):
        section, _ = parsed(model)
        assert (section.quantization, section.double_quant, section.dtype) == expected

    def test_what_means_nothing_here_is_said(self):
        assert not parsed({**BNB, "bnb_4bit_quant_storage": "uint8", "llm_int8_threshold": 6.0})[1]  # as by default
        _, notices = parsed({**BNB, "bnb_4bit_quant_storage": "bfloat16", "llm_int8_threshold": 5.0})
        assert any("model.bnb_4bit_quant_storage, model.llm_int8_threshold" in notice for notice in notices)
        _, notices = parsed({"load_in_8bit": True})
        assert any("the activations are not" in notice for notice in notices)
        _, notices = parsed({"bnb_4bit_quant_type": "nf4"})
        assert any("over: model.bnb_4bit_quant_type (neither load_in_4bit" in notice for notice in notices)

    @pytest.mark.parametrize(
        ("model", "message"),
        [
            ({"quantization_config": {"load_in_4bit": True}}, "bnb_4bit_quant_type is fp4"),
            ({**BNB, "bnb_4bit_quant_type": "fp4"}, "model.bnb_4bit_quant_type is fp4"),
            ({**BNB, "load_in_8bit": True}, "both true"),
            ({"load_in_4bit": "yes please"}, "expected true or false"),
            ({**BNB, "quantization": "int8"}, "wants model.quantization nf4, but model.quantization is int8"),
            ({**BNB, "double_quant": False}, "wants model.double_quant True"),
            ({**BNB, "dtype": "float32", "bnb_4bit_compute_dtype": "bfloat16"}, "but model.dtype is float32"),
            ({**BNB, "llm_int8_skip_modules": ["o_proj"]}, "llm_int8_skip_modules"),
            ({"quantization_config": BNB, "load_in_4bit": True}, "beside model.quantization_config"),
            ({"quantization_config": {"bits": 4}}, "BitsAndBytesConfig"),
            ({"quantization_config": [4]}, "BitsAndBytesConfig"),
            ({"quantization_config": {"quant_method": "gptq"}}, "quant_method is gptq"),
        ],
    )
    def test_are_refused_in_one_line(self, model, message):
        with pytest.raises(InputError) as caught:
            parsed(model)
        assert message in str(caught.value)
        assert "\n" not in str(caught.value)
