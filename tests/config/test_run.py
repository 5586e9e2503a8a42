"""Configurations: names of other libraries, types, contradictions, round trips, and the recipes."""

import json
from enum import StrEnum
from pathlib import Path

import pytest
import yaml

from phi3_jax import InputError
from phi3_jax.config import foreign
from phi3_jax.config.parse import read_yaml
from phi3_jax.config.run import SECTIONS, RunConfig, parse_run_config
from phi3_jax.config.sections import DataSection, ModelSection, PeftSection
from phi3_jax.config.training import TrainingSection
from tests.helpers.configs import error, parse

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))

# Microsoft's sample_finetune.py (MIT), as it stands there.
TRAINING_CONFIG = {
    "bf16": True,
    "do_eval": False,
    "learning_rate": 5.0e-06,
    "log_level": "info",
    "logging_steps": 20,
    "logging_strategy": "steps",
    "lr_scheduler_type": "cosine",
    "num_train_epochs": 1,
    "max_steps": -1,
    "output_dir": "./checkpoint_dir",
    "overwrite_output_dir": True,
    "per_device_eval_batch_size": 4,
    "per_device_train_batch_size": 4,
    "remove_unused_columns": True,
    "save_steps": 100,
    "save_total_limit": 1,
    "seed": 0,
    "gradient_checkpointing": True,
    "gradient_checkpointing_kwargs": {"use_reentrant": False},
    "gradient_accumulation_steps": 1,
    "warmup_ratio": 0.2,
}
PEFT_CONFIG = {
    "r": 16,
    "lora_alpha": 32,
    "lora_dropout": 0.05,
    "bias": "none",
    "task_type": "CAUSAL_LM",
    "target_modules": "all-linear",
    "modules_to_save": None,
}


def test_the_dictionaries_of_sample_finetune_carry_over_unchanged(capsys):
    run = RunConfig.from_dicts(
        model="microsoft/Phi-3-mini-4k-instruct",
        training_config=TRAINING_CONFIG,
        peft_config=PEFT_CONFIG,
        data="chats.jsonl",
    )
    assert run.model == ModelSection("microsoft/Phi-3-mini-4k-instruct", dtype="bfloat16")
    # What the script leaves to SFTTrainer is as there.
    assert run.data == DataSection(
        train="chats.jsonl",
        max_length=1024,
        packing=False,
        template="none",
        loss_on="completion",
        final_eos=True,
        skip_empty=True,
        packing_strategy="bfd",
    )
    assert run.peft == PeftSection(r=16, lora_alpha=32, lora_dropout=0.05, target_modules="all-linear")
    assert run.training == TrainingSection(
        output_dir="./checkpoint_dir",
        overwrite_output_dir=True,
        learning_rate=5e-6,
        lr_scheduler_type="cosine",
        warmup_ratio=0.2,
        eval_strategy="no",
        eval_on_start=False,
        logging_steps=20,
        save_total_limit=1,
    )
    assert capsys.readouterr().out == (
        "passed over: training.gradient_checkpointing_kwargs (training.remat_policy says what is kept for the backward "
        "pass, and where)\n"
    )


def test_no_key_of_transformers_arguments_is_dropped_in_silence():
    """Whatever it is set to, a key of TrainingArguments acts, is named as ignored, or is refused."""
    training_args = pytest.importorskip("transformers.training_args")
    base, _ = parse()
    silent = []
    for name in training_args.TrainingArguments.__dataclass_fields__:
        try:
            run, notices = parse(training={name: "something unheard of"})
            told = run != base or any(name in notice for notice in notices)
        except InputError as refused:
            told = "unknown key" not in str(refused)
        if not told:
            silent.append(name)
    assert silent == []


def test_every_known_name_is_one_that_its_section_does_not_have_itself():
    for section, cls in SECTIONS.items():
        assert not set(foreign.known_names(section)) & set(cls.__dataclass_fields__), section


@pytest.mark.parametrize(
    ("given", "section", "expected"),
    [
        ({"fp16": True}, "model", {"dtype": "float16"}),
        ({"bf16": "true"}, "model", {"dtype": "bfloat16"}),
        ({"evaluation_strategy": "no"}, "training", {"eval_strategy": "no"}),
        ({"eval_strategy": False}, "training", {"eval_strategy": "no"}),
        ({"optim": "adamw_torch"}, "training", {"optim": "adamw"}),
        ({"optim": "paged_adamw_8bit"}, "training", {"optim": "adamw_8bit"}),
        ({"optim": "lion_32bit"}, "training", {"optim": "lion"}),
        ({"adafactor": True}, "training", {"optim": "adafactor"}),
        ({"warmup_steps": 0.2}, "training", {"warmup_ratio": 0.2, "warmup_steps": 0}),
        ({"warmup_steps": "30"}, "training", {"warmup_steps": 30}),
        ({"resume_from_checkpoint": None}, "training", {"resume_from_checkpoint": False}),
        ({"max_seq_length": 512}, "data", {"max_length": 512}),
        ({"packing": False}, "data", {"packing": False}),
        ({"assistant_only_loss": False}, "data", {"loss_on": "completion"}),
        ({"dataset_text_field": "chat"}, "data", {"columns": {"text": "chat"}}),
        ({"report_to": "none"}, "logging", {"tensorboard": False, "wandb": False}),
        ({"report_to": ["tensorboard", "wandb"]}, "logging", {"tensorboard": True, "wandb": True}),
        ({"report_to": '["wandb"]'}, "logging", {"tensorboard": False, "wandb": True}),
        ({"disable_tqdm": True}, "logging", {"progress": False}),
        ({"run_name": "mine"}, "logging", {"run_name": "mine"}),
    ],
)
def test_names_of_transformers_and_trl_keep_their_meaning(given, section, expected):
    run, _ = parse(training=given)
    found = getattr(run, section)
    assert {name: getattr(found, name) for name in expected} == expected


def test_enums_of_a_python_script_are_read_as_their_values():
    class Strategy(StrEnum):
        EPOCH = "epoch"

    run, _ = parse(training={"save_strategy": Strategy.EPOCH})
    assert run.training.save_strategy == "epoch"


def test_a_setting_given_twice_with_two_values_is_an_error():
    message = error(model={"name_or_path": "base", "dtype": "float32"}, training={"bf16": True})
    assert "training.bf16" in message
    assert "model.dtype is float32" in message
    assert "training.max_seq_length" in error(training={"max_seq_length": 256}, data={"max_length": 512})
    assert parse(training={"max_seq_length": "512"}, data={"max_length": 512})[0].data.max_length == 512


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"lr_scheduler_type": "linear", "lr_scheduler_kwargs": {"num_cycles": 2}}, "and linear takes no settings"),
        ({"lr_scheduler_type": "reduce_lr_on_plateau"}, "'reduce_lr_on_plateau', expected one of constant,"),
        ({"metric_for_best_model": "accuracy"}, "is accuracy, but evaluations measure loss, perplexity, token_"),
    ],
)
def test_what_transformers_can_and_this_cannot_is_refused(given, words):
    assert f"training.{list(given)[-1]} " in error(training=given)
    assert words in error(training=given)


def test_a_pasted_adapter_config_is_a_peft_section(testdata):
    folder = testdata / "adapters"
    pasted = json.loads((folder / "phi-3-mini-4k_r16_all-fused" / "adapter_config.json").read_text())
    run, notices = parse(peft=pasted)
    assert run.peft.target_modules == ("gate_up_proj", "down_proj", "qkv_proj", "o_proj")
    assert run.peft.base_model_name_or_path == "microsoft/Phi-3-mini-4k-instruct"
    assert notices == []
    for kind, word in (("bdlora", "use_bdlora"), ("kasa", "kasa_config")):
        (file,) = (folder / "peft_official").glob(f"lora__*{kind}.adapter_config.json")
        assert word in error(peft=json.loads(file.read_text()))
    (file,) = (folder / "peft_official").glob("lora__*dora.adapter_config.json")
    dora = json.loads(file.read_text())
    assert "peft.target_modules is null" in error(peft=dora)  # PEFT has no default for Phi-3 either
    run, _ = parse(peft={**dora, "target_modules": ["qkv_proj"]})
    assert (run.peft.use_dora, run.peft.r) == (True, 32)
    for kind in ("ia3", "vera", "loha"):
        (file,) = (folder / "peft_official").glob(f"{kind}__*.adapter_config.json")
        assert "expected LORA" in error(peft=json.loads(file.read_text()))


def test_the_dictionary_of_a_peft_lora_config_is_a_peft_section():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=8, lora_alpha=16, target_modules=["o_proj"], task_type="CAUSAL_LM")
    run, _ = parse(peft=config.to_dict())
    assert run.peft == PeftSection(r=8, lora_alpha=16, target_modules=("o_proj",))
    config = peft.LoraConfig(target_modules=["o_proj"], alpha_pattern={"o_proj": 3}, modules_to_save=["lm_head"])
    run, _ = parse(peft=config.to_dict())
    assert (run.peft.alpha_pattern, run.peft.modules_to_save) == ({"o_proj": 3}, ("lm_head",))
    assert "corda" in error(peft=peft.LoraConfig(target_modules=["o_proj"], init_lora_weights="corda").to_dict())


def test_a_run_is_read_back_equal_from_the_yaml_that_it_writes():
    run = RunConfig(
        ModelSection("ba: se #\u00e4\n", dtype="float16"),
        PeftSection(r=3, target_modules=("o_proj", "lm_head"), init_lora_weights="gaussian", init_from="x"),
        DataSection("no", eval_fraction=0.25, columns={"prompt": "q"}, max_rows=7),
        TrainingSection("null", learning_rate=1e-5, eval_strategy="no", save_strategy="no", save_total_limit=None),
    )
    again, notices = parse_run_config(yaml.safe_load(run.to_yaml()))
    assert again == run
    assert notices == []


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_recipes_parse_and_say_what_they_need_and_take(path):
    raw = read_yaml(path)
    run, notices = parse_run_config(raw)
    assert notices == []
    assert run.data.train is not None
    comments = "".join(line for line in path.read_text().splitlines(keepends=True) if line.startswith("#"))
    assert "Needs:" in comments
    assert "Takes:" in comments
    for section, values in raw.items():  # nothing is lost on the way
        for key, value in values.items():
            found = getattr(getattr(run, section), key)
            assert (list(found) if isinstance(found, tuple) else found) == value, (section, key)


def test_the_recipe_of_sample_finetune_is_what_its_dictionaries_say():
    recipe, _ = parse_run_config(read_yaml(next(path for path in CONFIGS if path.stem == "phi3_mini_4k_lora")))
    run = RunConfig.from_dicts(
        model=recipe.model.name_or_path, training_config=TRAINING_CONFIG, peft_config=PEFT_CONFIG, data="x"
    )
    assert recipe.peft == run.peft
    free = {"output_dir", "overwrite_output_dir", "eval_strategy"}
    for name in set(TRAINING_CONFIG) & set(TrainingSection.__dataclass_fields__) - free:
        assert getattr(recipe.training, name) == getattr(run.training, name), name


def test_a_home_folder_is_written_out(monkeypatch):
    """A shell does it on the command line, nobody in a file."""
    monkeypatch.setenv("HOME", "/home/someone")
    settings = {"output_dir": "~/run", "fallback_dir": "~/other"}
    run = RunConfig.from_dict({"model": {"name_or_path": "x"}, "training": settings})
    assert (run.training.output_dir, run.training.fallback_dir) == ("/home/someone/run", "/home/someone/other")


@pytest.mark.parametrize(
    ("training", "message"),
    [
        ({"eval_steps": 5}, "training.eval_steps is 5, but there are no evaluation rows"),
        ({"eval_strategy": "epoch"}, "training.eval_strategy is epoch, but there are no evaluation rows"),
        ({"load_best_model_at_end": True}, "training.load_best_model_at_end is true, but there are no"),
    ],
)
def test_evaluations_need_rows_which_may_be_given_later(training, message):
    """Those of `train(run, eval_dataset=...)`, so that a run without any is no contradiction yet."""
    run = RunConfig.from_dict({"model": {"name_or_path": "x"}, "training": training})
    with pytest.raises(InputError, match=message):
        run.check_evaluation_rows()
    if "load_best_model_at_end" not in training:
        run.changed({"data.eval": "rows.jsonl"}).check_evaluation_rows()


@pytest.mark.parametrize(
    ("data", "training", "message"),
    [
        ({"shuffle": False}, {"group_by_length": True}, "group_by_length is true, but data.shuffle false wants"),
        ({"streaming": True}, {"group_by_length": True, "max_steps": 3}, "group_by_length is true, but of rows that"),
        ({"streaming": True}, {"dataloader_drop_last": True, "max_steps": 3}, "drop_last is true, but of rows that"),
    ],
)
def test_orders_that_cannot_be_are_told(data, training, message):
    raw = {"model": {"name_or_path": "x"}, "data": {"train": "x", **data}, "training": training}
    with pytest.raises(InputError, match=message):
        RunConfig.from_dict(raw)


def test_rows_have_a_seed_of_their_own_where_it_is_given():
    training = [RunConfig.from_dict({"model": {"name_or_path": "x"}, "training": t}).training for t in SEEDS]
    assert [section.order_seed for section in training] == [3, 0, 7]


SEEDS = ({"seed": 3}, {"seed": 3, "data_seed": 0}, {"seed": 3, "data_seed": 7})


def test_a_run_knows_which_keys_were_given():
    run, _ = parse_run_config({"model": {"name_or_path": "base"}, "peft": {"r": 16, "lora_alpha": 32}})
    assert run.given == {"model.name_or_path", "peft.r", "peft.lora_alpha"}
    assert "given" not in run.to_dict()
    assert run.changed({"peft.use_dora": True}).given == run.given | {"peft.use_dora"}
    script = {"peft_config": {"init_from": "x", "r": 8, "rank_pattern": {}}, "training_config": {}}
    run = RunConfig.from_dicts(model="base", data="chats.jsonl", **script)
    assert run.peft.lora_alpha == 8  # PEFT's default, which nobody gave
    assert {name for name in run.given if name.startswith("peft.")} == {"peft.init_from", "peft.r"}
