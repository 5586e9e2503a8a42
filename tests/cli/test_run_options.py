"""`--config` and `--section.key`: what becomes of them, and what wins."""

import pytest

from phi3_jax import InputError
from phi3_jax.cli.run_options import RunParser, make_run, read_run
from phi3_jax.config.parse import merged


def read(*argv: str):
    return read_run(RunParser("train", "").parse(argv))


def test_values_stay_text_under_the_names_of_other_libraries_too():
    assert read("--training.max_steps", "-1", "--training.bf16=true", "--model.name_or_path", "007") == {
        "model": {"name_or_path": "007"},
        "training": {"max_steps": "-1", "bf16": "true"},
    }


def test_entries_of_a_mapping_may_be_given_one_by_one():
    assert read("--data.columns.prompt", "q", "--data.columns.answer=a")["data"] == {
        "columns": {"prompt": "q", "answer": "a"}
    }
    given = ["--training.gradient_checkpointing_kwargs.use_reentrant", "false"]
    assert read(*given)["training"] == {"gradient_checkpointing_kwargs": {"use_reentrant": False}}


def test_the_last_of_two_wins_and_nothing_given_is_nothing():
    assert read("--training.seed", "1", "--training.seed", "null") == {"training": {"seed": "null"}}
    assert read() == {}


def test_own_options_have_their_defaults():
    parser = RunParser("plan", "")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--json", action="store_true")
    options = parser.parse(["--data.train", "x"])
    assert (options.steps, options.json, options.config) == (10, False, [])
    assert parser.parse(["--steps=3"]).steps == 3


def test_no_key_of_a_run_stands_in_the_help_of_another_command():
    assert "--training" not in RunParser("plan", "").format_help()


def test_sections_are_merged_key_by_key():
    under = {"model": {"dtype": "float32", "revision": "a"}, "data": None, "peft": {"r": 1}}
    over = {"model": {"revision": "b"}, "data": {"train": "x"}, "peft": None}
    assert merged(under, over) == {
        "model": {"dtype": "float32", "revision": "b"},
        "data": {"train": "x"},
        "peft": {"r": 1},
    }
    assert under["model"] == {"dtype": "float32", "revision": "a"}


@pytest.mark.parametrize(
    ("under", "over", "left"),
    [
        ({"eval_fraction": 0.1}, {"eval": "x"}, {"eval": "x"}),
        ({"eval_fraction": 0.1}, {"eval": "null"}, {"eval_fraction": 0.1, "eval": "null"}),
        ({}, {"eval": "x", "eval_fraction": 0.1}, {"eval": "x", "eval_fraction": 0.1}),
        ({"eval": "x"}, {"eval_fraction": 0.1}, {"eval": "x", "eval_fraction": 0.1}),
    ],
)
def test_rows_to_evaluate_on_win_over_the_share_of_an_earlier_layer(under, over, left):
    assert merged({"data": under}, {"data": over})["data"] == left


@pytest.mark.parametrize(
    ("under", "over", "left"),
    [
        ({"fsdp": -1, "context": 2}, {"axes": "auto"}, {"axes": "auto"}),
        ({"axes": "auto"}, {"fsdp": "8"}, {"fsdp": "8"}),
        ({"fsdp": -1}, {"axes": "given"}, {"fsdp": -1, "axes": "given"}),
    ],
)
def test_axes_and_what_chooses_them_win_over_those_of_an_earlier_layer(under, over, left):
    assert merged({"parallel": under}, {"parallel": over})["parallel"] == left


def test_evaluation_rows_of_the_command_line_win_over_a_recipes_share():
    data = make_run(read("--config", "own_chats_laptop", "--model.name_or_path=m", "--data.eval=x")).data
    assert (data.eval, data.eval_fraction) == ("x", 0.0)


@pytest.mark.parametrize("option", ["--columns", "--data.columns"])
def test_columns_are_spelled_as_in_other_commands(option):
    run = make_run(read("--model.name_or_path=m", option, "prompt=question,completion=answer"))
    assert run.data.columns == {"prompt": "question", "completion": "answer"}
    with pytest.raises(InputError, match="^data.columns: prompt=,b is not of the form prompt=question,"):
        make_run(read("--model.name_or_path=m", option, "prompt=,b"))


@pytest.mark.parametrize("given", ["--training.max_steps.x=1", "--data.seed=1", "--training.learnin_rate=1"])
def test_a_key_that_there_is_not_is_refused(given):
    with pytest.raises(InputError, match=f"unknown option {given[:-2]}; did you mean --"):
        read(given)


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ("--peft.rank_pattern.down_proj=x", "peft.rank_pattern is {'down_proj': 'x'}"),
        ("--data.columns.prompt=null", "data.columns is {'prompt': None}"),
    ],
)
def test_an_entry_of_the_wrong_type_is_refused_as_the_mapping_is(given, found):
    with pytest.raises(InputError, match=f"^{found}, expected a mapping of names or null$"):
        make_run(read("--model.name_or_path=m", given))


@pytest.mark.parametrize(
    ("given", "key", "value"),
    [
        (["--lr", "-1"], "training.learning_rate", "-1"),
        (["--training.learning-rate=1"], "training.learning_rate", "1"),
        (["--bf16"], "training.bf16", "true"),
        (["--bf16", "false"], "training.bf16", "false"),
        (["--packing", "--seed", "1"], "data.packing", "true"),
        (["--no-packing"], "data.packing", "false"),
        (["--use_peft", "false"], "peft.full_finetuning", "true"),
        (["--model", "m"], "model.name_or_path", "m"),
    ],
)
def test_names_without_a_section_and_switches_without_a_value(given, key, value):
    section, _, name = key.partition(".")
    assert read(*given)[section][name] == value


def test_how_much_is_said_is_the_runs_own_setting(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("verbosity: verbose\nlr: 1\ntraining: {seed: 2}\n")
    assert read("--config", str(file), "-q", "--learning_rate=3") == {
        "logging": {"verbosity": "quiet"},
        "training": {"learning_rate": "3", "seed": 2},
    }
