"""`phi3-jax lm-eval`: wrong options are told in one line. What it measures is in tests/evaluate."""

import pytest

pytest.importorskip("lm_eval")

from phi3_jax.cli import main


def test_an_option_that_nobody_knows_is_told_in_one_line(tmp_path, capsys):
    assert main(["lm-eval", "--model", str(tmp_path), "--tasks", "x", "--no_such_option", "1"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "no_such_option" in line
