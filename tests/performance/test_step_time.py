"""How long a step takes."""

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


def test_the_time_is_a_range_of_the_peak(capsys, mini):
    _, found = plan(capsys, mini, "--topology", "gpu:h100:8", "--parallel.fsdp", "8", "--data.max_length", "2048")
    least, most = found["step_seconds"]
    tokens = 8 * 4 * 2048
    assert found["tokens_per_step"] == tokens
    work = tokens * found["computed_flops_per_token"]
    assert [work / (8 * 989e12 * seconds) for seconds in (least, most)] == pytest.approx([0.55, 0.35])
    assert found["tokens_per_second"] == pytest.approx([tokens / most, tokens / least])
    assert "989 TFLOP/s" in found["time_basis"]
