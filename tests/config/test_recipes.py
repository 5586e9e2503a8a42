"""Recipes by name: found, told apart from files, listed, and what their headers say."""

import re
from pathlib import Path

import pytest

from phi3_jax.config.parse import read_yaml
from phi3_jax.config.recipes import FOLDER, PACKAGE, read_config, read_recipe, recipe, recipe_names, recipe_text
from phi3_jax.config.run import RunConfig
from phi3_jax.performance.plan import make_plan
from phi3_jax.system.errors import InputError
from tests.helpers.plans import ON_THE_HUB, checkpoint, header

ROOT = Path(__file__).parents[2]
COPY = "model:\n  name_or_path: mine\n"


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_packages_recipes_are_the_files_of_configs():
    assert FOLDER == ROOT / "configs"
    assert recipe_names() == sorted(file.stem for file in (ROOT / "configs").glob("*"))


@pytest.mark.parametrize("name", ["phi3_mini_4k_lora", "phi3_mini_4k_lora.yaml"])
def test_a_recipe_is_found_by_name_and_said(here, name):
    raw, line = read_config(name)
    assert raw == read_yaml(ROOT / "configs" / "phi3_mini_4k_lora.yaml")
    assert "packaged recipe" in line


def test_a_file_of_the_very_name_wins_and_is_said(here):
    (here / "phi3_mini_4k_lora.yaml").write_text(COPY)
    raw, line = read_config("phi3_mini_4k_lora.yaml")
    assert raw == {"model": {"name_or_path": "mine"}}
    assert "this file" in line
    # One of the two must be meant, and nobody knows which.
    with pytest.raises(InputError, match=r"may mean the packaged recipe, or phi3_mini_4k_lora\.yaml here"):
        read_config("phi3_mini_4k_lora")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("phi3_mini_4k_lroa", "did you mean phi3_mini_4k_lora; "),
        ("configs/phi3_mini_4k_lora.yaml", "--config phi3_mini_4k_lora takes"),
        ("mine", r"did you mean mine\.yaml, which is here"),
        ("folder/other.yaml", r"folder/other\.yaml: cannot be read"),
    ],
)
def test_what_is_neither_is_told_what_there_is(here, name, words):
    (here / "mine.yaml").write_text(COPY)
    with pytest.raises(InputError, match=words):
        read_config(name)


def test_files_of_the_package_are_found_from_anywhere(here):
    raw = read_recipe("demo")
    assert Path(raw["model"]["name_or_path"]).is_dir()
    assert Path(raw["data"]["train"]).is_file()
    (here / "copy.yaml").write_text(recipe_text("demo"))
    assert read_config("copy.yaml") == (raw, None)


def test_a_recipe_that_is_not_there_cannot_be_printed():
    with pytest.raises(InputError, match="there is no recipe demmo; did you mean demo"):
        recipe_text("demmo")


def test_every_recipe_has_a_line_that_says_model_method_and_device():
    found = {name: recipe(name) for name in recipe_names()}
    assert all(entry.title and entry.needs and len(entry.title) < 90 for entry in found.values())
    assert {found[name].method for name in ("phi3_mini_4k_qlora", "phi3_mini_4k_dora", "phi3_mini_4k_full")} == {
        "LoRA r 16, nf4",
        "DoRA r 16",
        "every weight",
    }
    assert found["own_chats_laptop"].model == "built in"
    assert found["phi3_mini_4k_lora"].needs == "a device with 24 GB"
    assert not any(str(PACKAGE) in entry.title for entry in found.values())


@pytest.mark.slow  # ten plans
def test_headers_state_what_plan_computes(tmp_path):
    checked = 0
    for name in recipe_names():
        raw = read_recipe(name)
        base = raw["model"]["name_or_path"]
        if base not in ON_THE_HUB:
            assert re.search(r"Needs: two CPU cores, 1 GB. Takes: ", recipe_text(name)), name
            continue
        raw["model"]["name_or_path"] = checkpoint(tmp_path / Path(base).name, ON_THE_HUB[base])
        lines = header(make_plan(RunConfig.from_dict(raw), "gpu:h100", estimate=True))
        assert [line for line in recipe_text(name).splitlines() if line in lines] == lines, (name, lines)
        checked += 1
    assert checked >= 10
