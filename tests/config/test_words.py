"""What other programs call the keys of a run."""

from dataclasses import fields

import pytest

from phi3_jax import InputError
from phi3_jax.config.foreign import known_names
from phi3_jax.config.run import SECTIONS
from phi3_jax.config.words import HINTED, UNDERSTOOD, full_key, near_key, placed
from tests.helpers.configs import parse

KEYS = {f"{section}.{field.name}" for section, cls in SECTIONS.items() for field in fields(cls)}


def test_every_word_stands_for_a_key_that_there_is():
    assert {*UNDERSTOOD.values(), *HINTED.values()} <= KEYS
    assert UNDERSTOOD.keys().isdisjoint(HINTED)


def test_names_of_trl_are_found_in_the_section_that_knows_them():
    assert full_key("bf16", SECTIONS) == "training.bf16"
    assert full_key("load_in_4bit", SECTIONS) == "model.load_in_4bit"
    assert full_key("use_rslora", SECTIONS) == "peft.use_rslora"


def test_a_yaml_file_may_be_flat():
    run, _ = parse(learning_rate=1e-3, lora_r=8, load_in_4bit=True, use_peft=True, dataset_name="x.jsonl")
    assert (run.training.learning_rate, run.peft.r, run.model.quantization) == (1e-3, 8, "nf4")
    assert (run.peft.full_finetuning, run.data.train) == (False, "x.jsonl")
    assert parse(model="other")[0].model.name_or_path == "other"
    assert parse(parallel="auto")[0].parallel.axes == "auto"


def test_one_number_written_twice_is_no_contradiction():
    run, _ = parse(lr=1e-4, learning_rate="1e-4", lora_r="8", peft={"r": 8})  # as YAML reads 0.0001 and 1e-4
    assert (run.training.learning_rate, run.peft.r) == (1e-4, 8)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"batch_size": 4}, "unknown key batch_size; did you mean training.per_device_train_batch_size?"),
        (
            {"lr": 1, "training": {"learning_rate": 2}},
            "lr is 1, but training.learning_rate is 2; leave one out",
        ),
        (
            {"use_peft": False, "peft": {"full_finetuning": False}},
            "use_peft is False, but peft.full_finetuning is False; leave one out",
        ),
        ({"lr": 1, "training": 2}, "training is 2, expected a section of keys and values"),
        ({"use_peft": "yes"}, "use_peft is 'yes', expected true or false"),
        ({"colour": 1}, "unknown key colour; the sections are model, peft, data, training, parallel, logging"),
        ({"trainig": {}}, "unknown section trainig; did you mean training?"),
        ({"trainig": 1}, "unknown key trainig; did you mean training?"),
    ],
)
def test_what_has_no_place_is_told(given, words):
    with pytest.raises(InputError) as caught:
        placed(given, SECTIONS)
    assert str(caught.value) == words


def test_no_name_that_is_passed_over_is_ever_suggested():
    foreign = {f"{section}.{name}" for section in SECTIONS for name in known_names(section)} - KEYS
    assert len(foreign) > 100
    slips = [name[:-1] for name in foreign] + [f"{name}s" for name in foreign] + [name.lower() for name in foreign]
    assert {near for slip in slips if (near := near_key(slip, SECTIONS)) is not None} <= KEYS
