"""PEFT's own configuration in place of ours."""

from dataclasses import fields

import pytest

peft = pytest.importorskip("peft")

from phi3_jax.config.lora import LoraConfig  # noqa: E402
from phi3_jax.config.peft_object import as_lora_config  # noqa: E402
from phi3_jax.system.errors import InputError  # noqa: E402


def test_what_it_leaves_open_is_as_peft_has_it():
    config = as_lora_config(peft.LoraConfig(target_modules=["o_proj", "qkv_proj"], task_type=peft.TaskType.CAUSAL_LM))
    assert config == LoraConfig(r=8, lora_alpha=8, target_modules=("o_proj", "qkv_proj"))
    assert as_lora_config(config) is config


def test_no_targets_are_all_linear_layers_as_in_a_script(capsys):
    assert as_lora_config(peft.LoraConfig()) == LoraConfig(r=8, lora_alpha=8, target_modules="all-linear")
    assert "PEFT none for Phi-3: all-linear is taken" in capsys.readouterr().out


def test_all_that_it_says_is_taken():
    given = {
        "r": 4,
        "lora_alpha": 12,
        "lora_dropout": 0.1,
        "target_modules": "all-linear",
        "exclude_modules": ["down_proj"],
        "rank_pattern": {"o_proj": 2},
        "alpha_pattern": {"o_proj": 3},
        "use_rslora": True,
        "use_dora": True,
        "init_lora_weights": False,
        "modules_to_save": ["lm_head"],
    }
    config = as_lora_config(peft.LoraConfig(**given))
    assert config == LoraConfig(**given)
    assert config.init_lora_weights is False
    eva = peft.LoraConfig(target_modules="all-linear", init_lora_weights="eva", eva_config=peft.EvaConfig(rho=1.5))
    assert as_lora_config(eva).eva_config["rho"] == 1.5


def test_every_setting_of_ours_is_one_of_pefts():
    assert {field.name for field in fields(LoraConfig)} <= set(peft.LoraConfig().to_dict())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: peft.IA3Config(), "peft.peft_type is IA3, expected LORA"),
        (lambda: peft.AdaLoraConfig(total_step=5, target_modules=["o_proj"]), "peft.peft_type is ADALORA"),
        (lambda: peft.LoraConfig(target_modules=["o_proj"], use_qalora=True), "peft.use_qalora is true"),
        (lambda: peft.LoraConfig(target_modules=["o_proj"], task_type="SEQ_CLS"), "peft.task_type is 'SEQ_CLS'"),
        (lambda: {"r": 4}, "the adapter's configuration is {'r': 4}, expected phi3_jax's or PEFT's LoraConfig"),
    ],
)
def test_refused_by_name(make, message):
    with pytest.raises(InputError, match=message):
        as_lora_config(make())


def test_what_a_later_peft_has_is_refused_where_it_is_on():
    class Later:
        peft_type, target_modules = "LORA", ["o_proj"]

        def __init__(self, value):
            self.value = value

        def to_dict(self):
            return {"r": 4, "target_modules": ["o_proj"], "use_magic": self.value}

    assert as_lora_config(Later(False)).r == 4
    with pytest.raises(InputError, match="peft has use_magic, which is not supported"):
        as_lora_config(Later(True))
