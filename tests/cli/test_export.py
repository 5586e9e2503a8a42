"""`phi3-jax export`."""

import json

import pytest

from phi3_jax.cli import main
from tests.helpers.commands import refusal


def test_export_writes_what_base_and_adapter_do_together(base, adapter, chats, tmp_path, capfd):
    merged = tmp_path / "deep" / "merged"
    assert main(["export", str(adapter), "--merge", "--output", str(merged), "--base-dtype", "float32"]) == 0
    losses = []
    for model in (["--model", str(base), "--adapter", str(adapter)], ["--model", str(merged)]):
        capfd.readouterr()
        assert main(["evaluate", *model, "--data", str(chats), "--max-length", "64", "--json"]) == 0
        losses.append(json.loads(capfd.readouterr().out)["eval_loss"])
    # Float32 sums in another order: W + sBA first, or the two products apart.
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert (merged / "tokenizer.json").is_file()
    assert [path.name for path in merged.parent.iterdir()] == ["merged"]
    line = refusal(capfd, ["export", adapter, "--merge", "--output", merged])
    assert str(merged) in line
