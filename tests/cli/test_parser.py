"""How options are spelt, and what is said of one that there is not."""

import pytest

from phi3_jax import InputError
from phi3_jax.cli.parser import Parser, positive


def parser() -> Parser:
    made = Parser("try", "A command.")
    made.add_argument("file", metavar="FILE", nargs="?")
    made.add_argument("--output")
    made.add_argument("--max-new-tokens", type=positive)
    made.add_argument("--parallel.data")
    made.add_mutually_exclusive_group().add_argument("--raw", action="store_true")
    return made


@pytest.mark.parametrize(
    ("given", "attribute", "value"),
    [
        (["--output", "x"], "output", "x"),
        (["--output_dir", "x"], "output", "x"),
        (["--output-dir=a_b=c"], "output", "a_b=c"),
        (["--max_new_tokens=3"], "max_new_tokens", 3),
        (["--output", "max_new_tokens"], "output", "max_new_tokens"),
        (["--output=--max_new"], "output", "--max_new"),
        (["--verbose"], "verbose", True),
        (["--", "--max_new"], "file", "--max_new"),
    ],
)
def test_old_spellings_are_aliases(given, attribute, value):
    assert getattr(parser().parse(given), attribute) == value


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("--max_new_token", "unknown option --max_new_token; did you mean --max-new-tokens"),
        ("--tokens", "did you mean --max-new-tokens"),
        ("--paralel.data", "did you mean --parallel.data"),
        ("--parallel.dat", "did you mean --parallel.data"),
        ("--data", "did you mean --parallel.data"),
        ("--rww", "did you mean --raw"),
        ("--max-tokens", "did you mean --max-new-tokens"),
        ("--foo", "unknown option --foo; see phi3-jax try --help"),
        ("--file", "give it by itself: phi3-jax try FILE"),
    ],
)
def test_the_nearest_option_is_named(given, message):
    with pytest.raises(InputError, match=message):
        parser().parse([given, "1"])


def test_options_of_another_program_are_left_alone():
    given = ["--num_fewshot", "3", "--output_path", "x", "--max_new_tokens", "1", "--", "--raw"]
    assert parser().spelt(given) == ["--num_fewshot", "3", "--output_path", "x", "--max-new-tokens", "1", "--", "--raw"]


@pytest.mark.parametrize("value", ["0", "-1", "1.5", "x", ""])
def test_a_count_is_at_least_one(value):
    with pytest.raises(InputError, match="no whole number of at least 1"):
        parser().parse([f"--max-new-tokens={value}"])
