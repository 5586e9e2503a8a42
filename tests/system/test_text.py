"""What a terminal gets of a text, and what a file does."""

import io

import pytest

from phi3_jax.system.text import write_piece


@pytest.mark.parametrize(("is_terminal", "written"), [(True, "a\\x1b[31m\n"), (False, "a\x1b[31m\n")])
def test_only_a_terminal_is_kept_from_being_steered(is_terminal, written):
    out = io.StringIO()
    out.isatty = lambda: is_terminal
    write_piece("a\x1b[31m\n", out)
    assert out.getvalue() == written
