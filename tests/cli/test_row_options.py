"""Options that say how rows are read."""

import json

import pytest

from phi3_jax.cli import main
from phi3_jax.cli.parser import Parser
from phi3_jax.cli.row_options import add_row_arguments, with_row_options
from phi3_jax.config.sections import DataSection
from tests.helpers.commands import ROW, refusal


def given(*argv):
    parser = Parser("x", "x")
    add_row_arguments(parser)
    return with_row_options(DataSection(), parser.parse(list(argv)))


def test_options_are_keys_of_the_section():
    assert given() == DataSection()
    said = given(
        *("--ignore-keys", "name, id", "--literal-roles", "[]", "--template", "none"),
        *("--skip-invalid", "--skip-empty", "--final-eos"),
    )
    assert said.ignore_keys == ["name", "id"]
    assert (said.literal_roles, said.template) == ([], "none")
    assert said.skip_invalid is said.skip_empty is said.final_eos is True
    assert given("--literal-roles", "user, tool").literal_roles == ["user", "tool"]


def test_evaluate_reads_rows_as_it_is_told(base, tmp_path, capfd):
    file = tmp_path / "chats.jsonl"
    file.write_text(json.dumps(ROW | {"tools": [{"name": "f"}]}) + "\n" + json.dumps({"messages": 3}) + "\n")
    arguments = ["evaluate", "--model", str(base), "--data", str(file), "--max-length", "64"]
    assert "row 1: has tools" in refusal(capfd, arguments)
    assert "row 2: " in refusal(capfd, [*arguments, "--ignore-keys", "tools"])
    assert main([*arguments, "--ignore-keys", "tools", "--skip-invalid", "--json"]) == 0
    found = json.loads(capfd.readouterr().out)
    assert (found["rows"], found["invalid"]) == (1, 1)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--literal-roles", "usr"], ["--literal-roles", "usr is no role", "assistant"]),
        (["--template", "raw"], ["--template", "raw", "none"]),
    ],
)
def test_other_values_are_refused_in_one_line(argv, words, capfd):
    line = refusal(capfd, ["evaluate", "--data", "x", *argv])
    assert [word for word in words if word not in line] == []
