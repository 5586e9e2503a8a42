"""The names of transformers' generation settings: none is in no list, and none in two."""

from dataclasses import fields

import pytest

from phi3_jax.config.generation import GenerationConfig
from phi3_jax.config.generation_names import NO_EFFECT, asked_for, is_known, not_implemented

transformers = pytest.importorskip("transformers")


def test_every_setting_of_transformers_is_ours_or_is_known() -> None:
    ours = {field.name for field in fields(GenerationConfig)}
    theirs = {name for name in vars(transformers.GenerationConfig()) if not name.startswith("_")}
    assert len(theirs) > 50
    assert [name for name in theirs - ours if not is_known(name)] == []
    assert [name for name in ours if is_known(name)] == []
    assert NO_EFFECT & set(not_implemented()) == set()


def test_their_defaults_ask_for_nothing() -> None:
    defaults = transformers.GenerationConfig._get_default_generation_params()
    assert asked_for(defaults, draws=True) == {}
    assert asked_for({"output_scores": True}, draws=True, in_a_file=True) == {}
    assert asked_for({"output_scores": True}, draws=True) == {"output_scores": True}
