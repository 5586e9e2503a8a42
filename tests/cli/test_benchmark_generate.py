"""`phi3-jax benchmark generate`."""

import json
from typing import Any

import pytest

from phi3_jax.cli import main
from phi3_jax.parallel.mesh import device_line
from tests.helpers.models import tiny_model

TINY = ["--hidden", "64", "--layers", "2", "--heads", "4", "--kv-heads", "2", "--vocab", "96"]


def test_command(tmp_path: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """A folder with config.json alone gives that shape with random weights."""
    config = tiny_model().config
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    options = ["--prompt", "6", "--new-tokens", "5", "--rounds", "1", "--dtype", "bfloat16", "--json"]
    assert main(["benchmark", "generate", "--model", str(tmp_path), *options]) == 0
    captured = capsys.readouterr()
    assert captured.err == device_line() + "\n"
    figures = json.loads(captured.out)
    assert figures["settings"] == {
        "batch": 1,
        "prompt": 6,
        "new_tokens": 5,
        "rounds": 1,
        "dtype": "bfloat16",
        "hidden": 32,
        "layers": 2,
        "vocab": 53,
    }
    assert figures["tokens_per_second"] > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--new-tokens", "1"], "1 new tokens are no decoding"),
        (["--prompt", "5000", "--model", "MODEL"], "exceed the model's 4096 positions"),
        (["--model", "MODEL", "--hidden", "32"], "--hidden is given, but --model says"),
        (["--model", "/nowhere"], "/nowhere"),
    ],
)
def test_refused(options: list[str], message: str, tmp_path: Any, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text(json.dumps(tiny_model().config.to_dict()))
    options = [str(tmp_path) if option == "MODEL" else option for option in options]
    shape = [] if "--model" in options else TINY
    assert main(["benchmark", "generate", *shape, *options]) == 2
    assert message in capsys.readouterr().err
