"""`phi3-jax chat`."""

import pytest

from phi3_jax.cli import main
from phi3_jax.demo import demo_path


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--adapter", "none"], "--adapter none has no meaning here"),
        (["--temperature", "0.5", "--no-do-sample"], "--temperature has no effect with --no-do-sample"),
        (["--sytem", "x"], "did you mean --system?"),
    ],
)
def test_wrong_options(options, words, capfd):
    assert main(["chat", "--model", str(demo_path("base")), *options]) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert words in line
