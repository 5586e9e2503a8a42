"""From dictionaries to sections."""

import pytest

from phi3_jax import InputError
from phi3_jax.config.parse import read_yaml
from tests.helpers.configs import error, parse


@pytest.mark.parametrize(
    ("sections", "expected"),
    [
        ({"training": {"learnin_rate": 1}}, "unknown key training.learnin_rate; did you mean training.learning_rate?"),
        ({"training": {"lr": 1}}, "unknown key training.lr; did you mean training.learning_rate?"),
        ({"training": {"gradient_acumulation_steps": 1}}, "training.gradient_accumulation_steps?"),
        ({"training": {"evalution_strategy": 1}}, "did you mean training.eval_strategy?"),
        ({"data": {"learning_rate": 1}}, "unknown key data.learning_rate; did you mean training.learning_rate?"),
        ({"peft": {"rank": 1}}, "unknown key peft.rank; did you mean peft.r?"),
        ({"training": {"foo": 1}}, "unknown key training.foo; `phi3-jax train --help training` lists its keys"),
        ({"trainig": {}}, "unknown section trainig; did you mean training?"),
        ({"training": [1]}, "training is [1], expected a section"),
        ({"training": {"learning_rate": "fast"}}, "training.learning_rate is 'fast', expected a number"),
        ({"training": {"max_steps": 1.5}}, "training.max_steps is 1.5, expected a whole number"),
        ({"training": {"optim": "adam"}}, "training.optim is 'adam', expected one of adamw, adamw_8bit"),
        ({"training": {"gradient_checkpointing": "maybe"}}, "expected true or false"),
        ({"data": {"train": 12}}, "data.train is 12, expected text or null"),
        ({"data": {"columns": {"prompt": 3}}}, "data.columns is {'prompt': 3}, expected a mapping"),
        ({"data": {"ignore_keys": 3}}, "data.ignore_keys is 3, expected a list of names"),
        ({"data": {"ignore_keys": "null"}}, "data.ignore_keys is 'null', expected a list of names"),
        (
            {"data": {"literal_roles": "usr"}},
            "data.literal_roles is ['usr'], expected a list of system, user, assistant",
        ),
        ({"peft": {"target_modules": []}}, "peft.target_modules is empty"),
        ({"peft": {"init_lora_weights": "loftq"}}, "model.quantization is none; give nf4"),
        (
            {"peft": {"init_lora_weights": "pissa"}, "model": {"name_or_path": "x", "quantization": "nf4"}},
            "leave quantization out, or give loftq",
        ),
        ({"model": {}}, "model.name_or_path is not given"),
        ({"training": {"learning_rate": float("nan")}}, "training.learning_rate is nan, expected at least 0"),
        ({"training": {"warmup_ratio": 1.1}}, "training.warmup_ratio is 1.1, expected from 0 to 1"),
        ({"training": {"per_device_train_batch_size": 0}}, "training.per_device_train_batch_size is 0"),
        ({"training": {"max_steps": 0}}, "training.max_steps is 0"),
        ({"training": {"num_train_epochs": 0}}, "nothing to train"),
        ({"data": {"eval_fraction": 1.0}}, "data.eval_fraction is 1.0"),
        ({"parallel": {"data": 0}}, "parallel.data is 0"),
        ({"parallel": {"data": -1, "fsdp": -1}}, "parallel.data and parallel.fsdp are -1"),
        # Contradictions.
        (
            {"training": {"load_best_model_at_end": True}, "data": {"eval": "x"}},
            "training.load_best_model_at_end is true, but training.eval_steps is null, so that nothing is evaluated",
        ),
        (
            {"training": {"early_stopping_patience": 2, "eval_strategy": "no"}, "data": {"eval": "x"}},
            "training.early_stopping_patience is 2, but training.eval_strategy is no, so that nothing",
        ),
        (
            {
                "training": {"load_best_model_at_end": True, "eval_steps": 5, "save_strategy": "no"},
                "data": {"eval": "x"},
            },
            "training.save_strategy is no",
        ),
        ({"peft": {"full_finetuning": True, "init_from": "x"}}, "peft.init_from is x, but peft.full_finetuning"),
    ],
)
def test_what_is_wrong_is_told_in_one_line_that_names_the_key(sections, expected):
    assert expected in error(**sections)


def test_text_of_a_command_line_and_yaml_1_1_floats_are_typed():
    run, _ = parse(
        training={"learning_rate": "5e-6", "max_steps": "-1", "gradient_checkpointing": "false", "eval_steps": "null"},
        peft={"target_modules": '["o_proj", "down_proj"]', "lora_alpha": "16"},
        data={"train": "123"},
    )
    assert run.training.learning_rate == 5e-6
    assert run.training.gradient_checkpointing is False
    assert run.training.eval_steps is None
    assert run.peft.target_modules == ("o_proj", "down_proj")
    assert run.data.train == "123"


@pytest.mark.parametrize(
    ("given", "keys"),
    [
        ("name", ["name"]),
        ("name, id", ["name", "id"]),
        ("[name, id]", ["name", "id"]),
        ("[]", []),
        (["name"], ["name"]),
    ],
)
def test_names_alone_are_a_list(given, keys):
    run, _ = parse(data={"ignore_keys": given})
    assert run.data.ignore_keys == keys


@pytest.mark.parametrize(
    ("given", "targets"),
    [
        ("q_proj,v_proj", ("q_proj", "v_proj")),
        ("q_proj, v_proj", ("q_proj", "v_proj")),
        ("all-linear", "all-linear"),
        ("model.layers.0.mlp.down_proj", "model.layers.0.mlp.down_proj"),
        (".*layers.[0-9]{1,2}.*(q|v)_proj", ".*layers.[0-9]{1,2}.*(q|v)_proj"),
    ],
)
def test_target_names_with_commas_are_a_list_and_an_expression_stays_one(given, targets):
    run, _ = parse(peft={"target_modules": given})
    assert run.peft.target_modules == targets


def test_columns_may_be_text():
    for given in ("prompt=q", "{prompt: q}", {"prompt": "q"}):
        assert parse(data={"columns": given})[0].data.columns == {"prompt": "q"}
    assert parse(data={"eval": "day=1/x.jsonl"})[0].data.eval == "day=1/x.jsonl"  # a path


def test_a_file_that_is_no_configuration_is_told(tmp_path):
    file = tmp_path / "run.yaml"
    for text, words in (("a: [", "is not YAML"), ("- 1\n- 2", "holds a list")):
        file.write_text(text)
        with pytest.raises(InputError, match=words):
            read_yaml(file)
    with pytest.raises(InputError, match="cannot be read"):
        read_yaml(tmp_path / "none.yaml")
    file.write_text("")
    assert read_yaml(file) == {}
