"""What a script for TRL and PEFT says and leaves out, as the sections of a run."""

import copy
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from phi3_jax import InputError, RunConfig
from phi3_jax.config.scripts import sections_of_script
from scripts import docs_dictionaries

TARGETS = {"target_modules": ["o_proj"]}


def run_of(training=None, peft=TARGETS, model="base", data="x.jsonl", **more):
    return RunConfig.from_dicts(model=model, training_config=training or {}, peft_config=peft, data=data, **more)


class Told:
    """An object with `to_dict`, as those of transformers and PEFT."""

    def __init__(self, **values):
        self.__dict__.update(values)

    def to_dict(self):
        return {key: f"<{key.upper()}>" if key.endswith("_token") else value for key, value in self.__dict__.items()}


def test_the_page_of_keys_is_what_the_tables_say():
    assert docs_dictionaries.PAGE.read_text(encoding="utf-8") == docs_dictionaries.page(), (
        "run python scripts/docs_dictionaries.py"
    )


def test_what_is_not_named_has_the_default_of_its_library():
    run = run_of(peft={"r": 16, **TARGETS})
    assert (run.peft.r, run.peft.lora_alpha, run.training.learning_rate) == (16, 8, 5e-5)
    assert run_of(peft=TARGETS).peft.r == 8
    assert run_of({"packing": True}).training.learning_rate == 2e-5  # a name that only SFTConfig has
    assert (run_of().training.gradient_checkpointing, run_of({"packing": True}).training.gradient_checkpointing) == (
        False,
        True,
    )


@pytest.mark.parametrize(
    ("training", "loss_on"),
    [
        ({}, "completion"),
        ({"assistant_only_loss": False}, "completion"),
        ({"completion_only_loss": None}, "completion"),
        ({"assistant_only_loss": False, "completion_only_loss": True}, "completion"),
        ({"completion_only_loss": False}, "all"),
        ({"assistant_only_loss": True, "completion_only_loss": None}, "assistant"),
        ({"assistant_only_loss": True, "completion_only_loss": False}, "assistant"),
    ],
)
def test_the_two_flags_of_the_loss_mean_one_thing(training, loss_on):
    assert run_of(training).data.loss_on == loss_on


@pytest.mark.parametrize(
    ("training", "section", "key", "meant"),
    [
        ({"max_grad_norm": None}, "training", "max_grad_norm", 0),
        ({"max_grad_norm": 0}, "training", "max_grad_norm", 0),
        ({"max_steps": 0}, "training", "max_steps", -1),
        ({"save_total_limit": 0}, "training", "save_total_limit", None),
        ({"packing": True, "gradient_checkpointing": None}, "training", "gradient_checkpointing", False),
        ({"warmup_ratio": None}, "training", "warmup_ratio", 0),
        ({"report_to": []}, "logging", "tensorboard", False),
        ({"report_to": "tensorboard"}, "logging", "tensorboard", True),
        ({"train_sampling_strategy": "sequential"}, "data", "shuffle", False),
        ({"train_sampling_strategy": "group_by_length"}, "training", "group_by_length", True),
        ({"log_level": "error"}, "logging", "verbosity", "quiet"),
        ({"log_level": "passive"}, "logging", "verbosity", "normal"),
        ({"packing": True}, "data", "packing_strategy", "bfd"),
        ({"packing": True, "packing_strategy": "wrapped"}, "data", "packing_strategy", "wrapped"),
        ({"max_length": None}, "data", "max_length", None),
        ({"truncation_mode": "keep_end"}, "data", "truncation_mode", "keep_end"),
        ({"hub_token": None, "push_to_hub": False}, "training", "hub_token", None),
        ({"packing": None}, "data", "packing", False),
        ({"push_to_hub": None}, "training", "push_to_hub", False),
        ({"logging_strategy": False}, "training", "logging_strategy", "no"),
        # Earlier names, which `to_dict` of earlier versions has as null.
        ({"max_seq_length": None}, "data", "max_length", 1024),
        ({"evaluation_strategy": None}, "training", "eval_strategy", "no"),
        ({"per_gpu_train_batch_size": None, "push_to_hub_organization": None}, "training", "hub_model_id", None),
        ({"per_gpu_train_batch_size": 2}, "training", "per_device_train_batch_size", 2),
        ({"shuffle_dataset": False}, "data", "shuffle", True),  # the sampler draws all the same
    ],
)
def test_null_and_zero_switch_off_what_they_switch_off_there(training, section, key, meant):
    assert getattr(getattr(run_of(training), section), key) == meant


def test_steps_between_evaluations_are_those_between_lines_unless_given():
    rows = {"train": "x.jsonl", "eval": "y.jsonl"}
    assert run_of({"eval_strategy": "steps", "logging_steps": 7}, data=rows).training.eval_steps == 7
    assert run_of({"eval_strategy": "steps", "eval_steps": 3}, data=rows).training.eval_steps == 3
    assert run_of({"eval_strategy": "epoch"}, data=rows).training.eval_steps is None


@pytest.mark.parametrize(
    ("training", "model", "dtype"),
    [
        ({}, "base", "bfloat16"),
        ({"bf16": False}, "base", "float32"),
        ({"bf16": False}, {"name_or_path": "base", "torch_dtype": "bfloat16"}, "bfloat16"),
        ({"bf16": False, "model_init_kwargs": {"dtype": "bfloat16"}}, "base", "bfloat16"),
        ({"bf16": True}, {"name_or_path": "base", "dtype": "float32"}, "bfloat16"),
        ({"bf16": True, "model_init_kwargs": {"torch_dtype": "float32"}}, "base", "bfloat16"),
        ({}, {"name_or_path": "base", "dtype": "float32"}, "float32"),
        ({"fp16": True, "bf16": False}, "base", "float16"),
        ({"bf16": False, "model_init_kwargs": {"dtype": "auto"}}, "base", "bfloat16"),
    ],
)
def test_the_type_in_which_a_script_computes(training, model, dtype):
    assert run_of(training, model=model).model.dtype == dtype


@pytest.mark.parametrize(
    ("training", "model", "compute", "dtype", "said"),
    [
        ({"bf16": True}, {}, "float32", "bfloat16", "bnb_4bit_compute_dtype float32 (the run computes in bfloat16"),
        ({"fp16": True}, {}, "bfloat16", "float16", "bnb_4bit_compute_dtype bfloat16 (the run computes in float16"),
        ({"bf16": False}, {}, "bfloat16", "bfloat16", ""),
        ({"bf16": False}, {"dtype": "bfloat16"}, "float32", "bfloat16", "compute_dtype float32 (the run computes in"),
    ],
)
def test_mixed_precision_wins_over_the_type_of_four_bit_products(training, model, compute, dtype, said, capsys):
    four = Told(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=compute)
    run = run_of(training, model={"name_or_path": "base", **model}, quantization_config=four)
    assert (run.model.dtype, run.model.quantization) == (dtype, "nf4")
    assert said in capsys.readouterr().out


def test_paths_and_numbers_of_numpy_are_taken():
    run = run_of(
        {"learning_rate": np.float32(0.5), "bf16": np.bool_(True), "output_dir": Path("out")},
        peft={"lora_alpha": np.float32(4), "target_modules": np.array(["o_proj"])},
        model=Path("base"),
        data={"train": "x.jsonl", "eval": {"chats": Path("y.jsonl")}},
    )
    assert (run.model.name_or_path, run.training.output_dir, run.training.learning_rate) == ("base", "out", 0.5)
    assert (run.peft.lora_alpha, run.peft.target_modules, run.data.eval) == (4, ("o_proj",), {"chats": "y.jsonl"})
    assert run_of(data=Path("x.jsonl")).data.train == "x.jsonl"


def test_a_script_keeps_its_dictionaries_as_they_are():
    training = {"bf16": True, "model_init_kwargs": {"dtype": "float32"}, "eos_token": "<EOS_TOKEN>"}
    model, peft = {"name_or_path": "base", "torch_dtype": "float32"}, {"r": 4}
    before = copy.deepcopy((training, model, peft))
    run_of(training, peft=peft, model=model)
    assert (training, model, peft) == before


def test_a_section_of_rows_wins_over_defaults_and_not_over_the_script():
    rows = {"train": "x.jsonl", "packing": True, "max_length": 64, "template": "auto"}
    run = run_of({"packing": False, "max_length": 1024}, data=rows)  # as `to_dict` says all of its defaults
    assert (run.data.packing, run.data.max_length, run.data.template) == (True, 64, "auto")
    with pytest.raises(InputError, match="training.max_length wants data.max_length 512, but data.max_length is 64"):
        run_of({"max_length": 512}, data=rows)


def test_objects_say_what_their_dictionaries_mask():
    """`to_dict` writes <EOS_TOKEN> whether one is set or not."""
    run = RunConfig.from_trl(Told(max_length=99, eos_token=None), Told(r=4, **TARGETS), model="base", data="x")
    assert (run.data.max_length, run.peft.r, run.peft.lora_alpha) == (99, 4, 8)
    with pytest.raises(InputError, match='training.eos_token is "</s>", which is not supported'):
        RunConfig.from_trl(Told(eos_token="</s>"), Told(**TARGETS), model="base", data="x")
    assert run_of({"eos_token": "<EOS_TOKEN>", "hub_token": "<HUB_TOKEN>"}) == run_of()


def test_no_adapter_is_all_weights_and_no_targets_are_all_linear_layers(capsys):
    assert RunConfig.from_trl({}, model="base", data="x").peft.full_finetuning
    assert "all weights of the model are trained" in capsys.readouterr().out
    assert run_of(peft={}).peft.target_modules == "all-linear"
    assert "PEFT none for Phi-3: all-linear is taken" in capsys.readouterr().out
    run_of(peft={"init_from": "adapter"})  # which brings its own
    assert not capsys.readouterr().out


def test_slices_get_adapters_that_peft_gives_none_which_is_said(capsys):
    run = run_of(peft={"target_modules": {"q_proj", "o_proj"}})
    assert run.peft.target_modules == ("o_proj", "q_proj")
    assert "target_modules has q_proj: slices of qkv_proj" in capsys.readouterr().out
    run_of(peft=TARGETS)
    assert not capsys.readouterr().out


def test_the_model_may_bring_its_quantisation_and_its_adapter():
    @dataclass
    class ModelConfig:
        model_name_or_path: str = "base"
        use_peft: bool = True
        lora_r: int = 3
        lora_target_modules: tuple[str, ...] = ("o_proj",)
        load_in_4bit: bool = False
        bnb_4bit_quant_type: str = "nf4"

    run = RunConfig.from_trl({}, model=ModelConfig(), data="x")
    assert (run.model.name_or_path, run.model.quantization, run.peft.r) == ("base", None, 3)
    assert RunConfig.from_trl({}, TARGETS, model=ModelConfig(), data="x").peft.r == 8
    assert RunConfig.from_trl({}, model=ModelConfig(use_peft=False), data="x").peft.full_finetuning
    four = Told(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype="bfloat16")
    run = run_of(quantization_config=four)
    assert (run.model.quantization, run.model.double_quant, run.model.dtype) == ("nf4", False, "bfloat16")
    with pytest.raises(InputError, match="quantization_config is given twice"):
        run_of(model={"name_or_path": "base", "quantization_config": {}}, quantization_config=four)


def test_what_is_passed_over_is_said_with_its_reason_once_it_says_something():
    _, notices = sections_of_script(
        model="base",
        training_config={"fsdp": "full_shard", "ddp_timeout": 1800, "dataloader_pin_memory": True, "use_cpu": False},
        peft_config=TARGETS,
        data="x",
    )
    assert notices == ["passed over: training.fsdp (the section parallel says how devices share the work)"]


def test_what_is_no_dictionary_is_refused():
    for wrong in ({"data": None}, {"data": ["x"]}, {"model": None}, {"training": {1: 2}}):
        with pytest.raises(InputError, match=r"expected a dictionary|has the key 1, expected names"):
            run_of(**wrong)
    with pytest.raises(InputError, match="training_config is 3, expected a dictionary, or an object of TRL"):
        RunConfig.from_trl(3, model="base", data="x")
