"""What a page's templates make of what they show."""

import tomllib
from pathlib import Path

import pytest
from jinja2 import UndefinedError

from phi3_jax.report import page
from phi3_jax.report.page import environment


def text(value: object) -> str:
    """As a template writes it."""
    return environment().from_string("{{ value }}").render(value=value)


def test_what_moves_or_hides_text_is_shown_and_other_scripts_are_left_alone():
    assert text("a\u2067b\u200bc\u2028d\U000e0041e\ufeff\x7f") == (r"a\u2067b\u200bc\u2028d\U000e0041e\ufeff\x7f")
    for kept in ("שלום עולם", "क्षि", "👩\u200d👩\u200d👧", "a\tb\nc", "می\u200cخواهم"):
        assert text(kept) == kept


def test_a_name_that_a_template_does_not_get_is_an_error():
    with pytest.raises(UndefinedError, match="'absent' is undefined"):
        environment().from_string("{{ absent }}").render()


def test_every_template_is_installed_with_the_package():
    root = Path(page.__file__).parents[1]
    patterns = tomllib.loads((root.parent / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    installed = {path for pattern in patterns["phi3_jax"] for path in root.glob(pattern)}
    templates = {root / "report" / "templates" / name for name in environment().list_templates()}
    assert len(templates) == 9
    assert templates <= installed
