"""The table of other libraries' names: whole, and read as it says."""

import pytest

from phi3_jax import InputError
from phi3_jax.config.foreign import known_names, table, translate
from phi3_jax.config.run import SECTIONS


def test_no_name_stands_twice_in_a_section():
    for section in SECTIONS:
        names = known_names(section)
        assert len(set(names)) == len(names), section


def test_every_target_is_a_key_of_a_run():
    names = (table().training, table().model, table().peft)
    targets = {target for part in names for target in part.renamed.values()}
    targets |= {key for part in names for flag in part.flags.values() for set_ in flag.values() for key in set_}
    assert len(targets) > 8
    for target in targets:
        section, key = target.split(".")
        assert key in SECTIONS[section].__dataclass_fields__, target
    for optimizer, *_ in table().optimizers.values():
        SECTIONS["training"](optim=optimizer)


@pytest.mark.parametrize(
    ("name", "value", "target", "meant"),
    [
        ("bf16", True, "model.dtype", "bfloat16"),
        ("fp16", "true", "model.dtype", "float16"),
        ("adafactor", True, "training.optim", "adafactor"),
        ("disable_tqdm", True, "logging.progress", False),
        ("disable_tqdm", False, "logging.progress", True),
        ("completion_only_loss", "false", "data.loss_on", "all"),
    ],
)
def test_a_flag_sets_what_it_means(name, value, target, meant):
    sections, _ = translate({"training": {name: value}})
    section, key = target.split(".")
    assert sections[section][key] == meant
    assert name not in sections["training"]


def test_bf16_false_is_said_to_set_nothing_where_nothing_else_says_the_type():
    assert "bf16 false sets nothing here; model.dtype" in translate({"training": {"bf16": False}})[1][0]
    assert not translate({"training": {"bf16": False}, "model": {"dtype": "float32"}})[1]


@pytest.mark.parametrize("name", ["bf16", "adafactor", "do_eval", "assistant_only_loss"])
def test_a_flag_is_true_or_false_or_nothing(name):
    assert translate({"training": {name: None}})[0] == {"training": {}}
    with pytest.raises(InputError, match=f"training.{name} is 'maybe', expected true or false"):
        translate({"training": {name: "maybe"}})


def test_what_peft_has_and_is_off_is_left_out():
    off = {name: empty for name in table().peft.off for empty in (None, False, {}, [])}
    assert translate({"peft": {**off, "peft_version": "1", "r": 3}}) == ({"peft": {"r": 3}}, [])
    with pytest.raises(InputError, match="peft.use_bdlora is true, which is not supported"):
        translate({"peft": {"use_bdlora": True}})
