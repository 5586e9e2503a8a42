"""Adapters that are given with a name and without."""

import pytest

from phi3_jax.peft.names import named


@pytest.mark.parametrize(
    ("text", "name", "path"),
    [
        ("mine=out/run/adapter", "mine", "out/run/adapter"),
        ("out/run/adapter", "run", "out/run/adapter"),
        ("out/run/checkpoints/40", "run-40", "out/run/checkpoints/40"),
        ("owner/model", "owner", "owner/model"),
        ("owner/some-adapter", "some-adapter", "owner/some-adapter"),
        ("out/a=b", "a_b", "out/a=b"),
        ("out/b c/", "b_c", "out/b c/"),
        ("=x", "_x", "=x"),
        ("~nobody-of-this-name/run/adapter", "run", "~nobody-of-this-name/run/adapter"),
        ("mine=" + 5000 * "x", "mine", 5000 * "x"),
    ],
)
def test_a_name_before_the_path_or_the_paths_own(text, name, path):
    assert named(text) == (name, path)


def test_what_is_there_under_the_whole_text_is_no_name_and_path(tmp_path, monkeypatch):
    (tmp_path / "x=y" / "adapter").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert named("x=y") == ("x_y", "x=y")
    monkeypatch.chdir(tmp_path / "x=y")
    assert named("adapter") == ("x_y", "adapter")
    assert named(".") == ("x_y", ".")
