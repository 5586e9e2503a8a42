"""The table of other libraries' names against the libraries: every field is known, every default theirs."""

import dataclasses

import pytest

from phi3_jax.config.foreign import known_names, table
from phi3_jax.config.run import SECTIONS
from scripts import docs_dictionaries

pytest.importorskip("trl")

import peft
import transformers
import trl

LIBRARIES = {
    "training": (transformers.TrainingArguments, trl.SFTConfig),
    "peft": (peft.LoraConfig,),
    "model": (trl.ModelConfig, transformers.BitsAndBytesConfig),
}


def fields_of(cls):
    if cls is transformers.BitsAndBytesConfig:
        return set(cls(load_in_4bit=True).to_dict())
    return {field.name for field in dataclasses.fields(cls)}


def defaults_of(cls):
    return {field.name: field.default for field in dataclasses.fields(cls)}


def test_every_field_is_known():
    for section, classes in LIBRARIES.items():
        known = {*known_names(section), *SECTIONS[section].__dataclass_fields__}
        known |= {"use_peft", *table().model.adapter} if section == "model" else set()
        for cls in classes:
            assert fields_of(cls) - known == set(), cls


def test_the_page_calls_no_name_of_theirs_ours_alone():
    for section, classes in LIBRARIES.items():
        for cls in classes:
            assert not docs_dictionaries.OURS[section] & fields_of(cls), cls


def test_defaults_are_theirs():
    ours = table().defaults
    theirs = {
        "transformers": {**defaults_of(trl.SFTConfig), **defaults_of(transformers.TrainingArguments)},
        "trl": defaults_of(trl.SFTConfig),
        "peft": defaults_of(peft.LoraConfig),
    }
    for library, values in theirs.items():
        given = {**ours["transformers"], **ours["trl"]} if library == "trl" else ours[library]
        for name, value in values.items():
            value = getattr(value, "value", value)
            if name in given and name != "accelerator_config":
                same = value == given[name] or not (value or given[name])
                assert same, f"{library}.{name} is {value} there, {given[name]} here"
            elif name not in ("bf16", "accelerator_config"):
                off = value in (None, False, "", "no", 0, {}, []) or isinstance(value, type(dataclasses.MISSING))
                assert off, f"{library}.{name} is {value} there, and not listed here"
