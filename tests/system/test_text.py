"""Text that is shown to people."""

import io
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from phi3_jax.system.errors import InputError
from phi3_jax.system.text import INVISIBLE, json_line, one_line, printable, shown, write_piece


class TestText:
    @given(text=st.text(st.characters(exclude_categories=())))
    @settings(max_examples=200)
    def test_no_error_can_steer_a_terminal(self, text):
        told = str(InputError(f"{text}: is wrong"))
        assert not INVISIBLE.search(told)
        assert len(told.splitlines()) <= 1
        assert told.encode()  # no half of a surrogate either

    def test_what_is_written_out(self):
        assert printable("a\x1b[31m\x9b\u202eb\ud800\U000e0041\tc\n") == (
            r"a\x1b[31m\x9b\u202eb\ud800\U000e0041" + "\tc\n"
        )
        assert one_line("a\nb\u2028c") == "a b c"
        assert printable("日本語 عربى 👩‍🔬") == "日本語 عربى 👩‍🔬"

    @given(text=st.text(st.characters(exclude_categories=())))
    @settings(max_examples=200)
    def test_lines_of_json_hold_the_text_and_cannot_steer_a_terminal(self, text):
        line = json_line({"answer": text, "more": "日本語 é\x1b\x9b\u202e\ud800\U000e0041\n"})
        assert not INVISIBLE.search(line)
        assert len(line.splitlines()) == 1
        assert json.loads(line)["answer"] == json.loads(json.dumps(text))
        assert "日本語 é\\u001b\\u009b" in line

    def test_long_lines_keep_both_ends(self):
        told = str(InputError("begin" + "x" * 10**6 + "end"))
        assert len(told) < 4100
        assert told.startswith("begin")
        assert told.endswith("end")

    def test_values_are_quoted_short_however_they_nest(self):
        value: list = []
        for _ in range(10**5):
            value = [value] * 2
        assert len(shown(value)) < 300
        assert len(shown({"a" * 10**6: "b" * 10**6})) < 500
        assert shown("a") == "'a'"


@pytest.mark.parametrize(("is_terminal", "written"), [(True, "a\\x1b[31m\n"), (False, "a\x1b[31m\n")])
def test_only_a_terminal_is_kept_from_being_steered(is_terminal, written):
    out = io.StringIO()
    out.isatty = lambda: is_terminal
    write_piece("a\x1b[31m\n", out)
    assert out.getvalue() == written
