"""The error that the user caused."""

from phi3_jax import InputError


def test_it_is_one_line_without_secrets():
    text = str(InputError("a\nb \x1b[2J hf_" + "a" * 34))
    assert "\n" not in text
    assert "\x1b" not in text
    assert "a" * 34 not in text
