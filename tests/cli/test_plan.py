"""`phi3-jax plan`."""

import json

import pytest

from phi3_jax.cli import main
from tests.helpers.plans import MINI, checkpoint


@pytest.fixture
def mini(tmp_path):
    return checkpoint(tmp_path / "mini", MINI)


def plan(capsys, folder, *arguments):
    """What `plan --json` prints, and its exit status."""
    status = main(["plan", "--model.name_or_path", folder, "--json", *arguments])
    captured = capsys.readouterr()
    return status, json.loads(captured.out) if status == 0 else captured.err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--topology", "v9:2x2"), ("v9:2x2", "gpu:KIND", "v5e")),
        (("--topology", "gpu:rtx"), ("gpu:rtx", "h100")),
        (("--topology", "v5e:3x3"), ("v5e:3x3", "2x2")),
        (("--topology", "v5e:2x2x2"), ("two dimensions",)),
        (("--topology", "v5e:2x2", "--parallel.fsdp", "3"), ("fsdp 3", "4 devices")),
        (("--topology", "gpu:h100:3", "--parallel.tensor", "3"), ("parallel.tensor is 3", "attention heads")),
        (("--topology", "cpu", "--data.max_length", "8192"), ("8,192", "4,096 positions")),
        (("--topology", "gpu:h100", "--model.attention", "splash"), ("splash", "gpu")),
        (("--topology", "v5e:1x1", "--model.attention", "cudnn"), ("cudnn", "tpu")),
        (("--topology", "gpu:l4", "--training.max_step", "3"), ("max_step", "max_steps")),
        (("--topolgy", "cpu"), ("--topolgy", "--topology")),
        ((), ("--topology",)),
    ],
)
def test_wrong_input_is_one_line(capsys, monkeypatch, mini, arguments, words):
    def compiled(*_):
        raise AssertionError("compiled")

    monkeypatch.setattr("phi3_jax.performance.plan.compile_elsewhere", compiled)
    status, said = plan(capsys, mini, *arguments)
    assert status == 2
    assert said.count("\n") == 1
    assert all(word in said for word in words), said
