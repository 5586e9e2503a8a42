"""Which steps `logging.profile` means, on the command line and in files."""

import pytest

from phi3_jax.config.profiled import check_steps_come, profiled_steps
from phi3_jax.config.run import RunConfig
from phi3_jax.system.errors import InputError
from phi3_jax.system.reading import parse_yaml


@pytest.mark.parametrize(
    ("text", "advice"),
    [
        ("13:10", "give 10:13"),
        ("3:3", "give 3:4"),
        ("0:2", "give 1:2"),
        ("10", "10:13 for steps 10 to 12"),
        ("1:2:3", "10:13 for steps 10 to 12"),
        ("1.5:3", "10:13 for steps 10 to 12"),
        ("-1:3", "10:13 for steps 10 to 12"),
        ("1:99999999999999999", "expected steps up to"),
    ],
)
def test_what_names_no_steps_is_refused_with_what_to_give(text, advice):
    with pytest.raises(InputError, match=rf"logging\.profile is .*{advice}"):
        profiled_steps(text)


def test_the_last_step_of_a_run_may_be_profiled_and_none_after_it():
    check_steps_come(profiled_steps("9:11"), 10)
    with pytest.raises(InputError, match="the run has 10 steps; give steps up to 11, as 9:11"):
        check_steps_come(profiled_steps("10:12"), 10)


def test_a_file_says_it_with_and_without_quotation_marks():
    for text in ("10:13", "'10:13'"):
        logging = parse_yaml(f"profile: {text}")
        assert RunConfig.from_dict({"model": {"name_or_path": "x"}, "logging": logging}).logging.profile == "10:13"


def test_steps_beyond_max_steps_are_refused_with_the_configuration():
    raw = {"model": {"name_or_path": "x"}, "logging": {"profile": "10:13"}, "training": {"max_steps": 5}}
    with pytest.raises(InputError, match="the run has 5 steps"):
        RunConfig.from_dict(raw)
