"""Regular expressions from files: those in use pass, those without end are stopped."""

import re
import subprocess
import sys
import time
from contextlib import suppress

import pytest

from phi3_jax.system import expressions
from phi3_jax.system.errors import InputError
from phi3_jax.system.expressions import check_expression, matches

NAME = "base_model.model.model.layers.12.self_attn.qkv_proj"
IN_USE = [
    r".*\.(layers|blocks)\.(1[0-9]|2[0-9])\.(self_attn|mlp)\..*(q|k|v|o)_proj",
    r".*\.(layers|blocks)\.(3[0-9])\.(self_attn|mlp)\..*(q|k|v|o)_proj",
    r".*model\.layers\.\d+\.(self_attn|mlp)\.(o_proj|qkv_proj|down_proj)",
    r"^(?!.*lm_head).*(qkv|o)_proj$",
    r"(.*\.)?(qkv_proj)$",
    r".*(?<!_)proj",
    r".*\.(\w+)_attn\.(?!\1).*",
    r".*\.(\w+)_attn\.\1.*",
    "qkv_proj",
]
ENDLESS = [r"(\w|.)+[!?]", r"(.|\w)*b", r"(?:.{1,9}){1,99}[!?]"]


@pytest.mark.parametrize("expression", IN_USE)
def test_those_in_use_mean_what_they_mean_in_python(expression):
    check_expression("x", expression)
    assert matches("x", expression, NAME) is (re.fullmatch(expression, NAME) is not None)


@pytest.mark.parametrize("expression", ENDLESS)
def test_those_without_end_are_refused_before_anything_is_matched(expression):
    start = time.process_time()
    with pytest.raises(InputError, match="^x: .*could take for ever to match") as caught:
        check_expression("x", expression)
    assert "\n" not in str(caught.value)
    assert time.process_time() - start < 20 * expressions.SECONDS


@pytest.mark.parametrize(
    "expression", [r"(a+)+b", r"(a|a)+b", r"(\w*)*!", ".*" * 6, r"(a?){40}a{40}", "a?" * 60, "a?" * 60 + "a" * 60]
)
@pytest.mark.parametrize("name", ["a" * 64, "a" * 64 + "!"])
def test_those_without_end_for_some_names_are_stopped_there(expression, name):
    check_expression("x", expression)
    start = time.process_time()
    with suppress(InputError):
        matches("x", expression, name)
    assert time.process_time() - start < 20 * expressions.SECONDS


@pytest.mark.parametrize("expression", ["a{4294967294}", "((a{200}){200}){200}", "(?x)a{ 100000000 }b"])
def test_counts_that_would_take_all_memory_are_refused(expression):
    """Python's `re` keeps the number; the regex package would write out as many characters: gigabytes."""
    with pytest.raises(InputError, match="^x: .* counts to [0-9,]+, further than any name; name the modules$"):
        check_expression("x", expression)


def test_the_same_take_python_for_ever():
    """Why Python's own is not used: it cannot even be stopped but by ending the process."""
    program = f"import re; re.fullmatch({ENDLESS[0]!r}, {NAME!r})"
    with pytest.raises(subprocess.TimeoutExpired):
        subprocess.run([sys.executable, "-c", program], timeout=3, check=False)


@pytest.mark.parametrize(
    "expression", ["(" * 5000, "(", "*", "a" * 10_001 + "*", "(?i", r"\p{L}", "a{" + "9" * 5000 + "}"]
)
def test_what_python_does_not_take_is_refused(expression):
    with pytest.raises(InputError, match="no regular expression|10,002 characters"):
        check_expression("x", expression)
