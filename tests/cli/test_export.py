"""`phi3-jax export`."""

import json

import pytest

from phi3_jax.cli import main
from tests.helpers.commands import refusal
from tests.helpers.model_hub import taking_uploads


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


def test_what_is_uploaded(base, adapter, tmp_path, capfd, monkeypatch):
    with taking_uploads(monkeypatch) as hub:
        assert main(["export", str(adapter), "--push-to-hub", "me/plain", "--private", "--revision", "v2"]) == 0
        out = capfd.readouterr().out
        assert f"note: the adapter names the folder {base} as its base" in out
        assert f"uploaded to {hub.url}/me/plain/tree/v2" in out
        there = hub.models["me/plain"]["v2"]
        assert there["adapter_model.safetensors"] == (adapter / "adapter_model.safetensors").read_bytes()
        assert b"base_model" not in there["README.md"].partition(b"\n---\n")[0]  # a folder here is no model there

        assert main(["export", str(adapter), "--portable", "--push-to-hub", "me/portable"]) == 0
        assert {"adapter_config.json", "README.md"} < set(hub.models["me/portable"]["main"])
        merged = tmp_path / "merged"
        hub.down["/api/models/me/merged/commit"] = 403
        merge = ["export", adapter, "--merge", "--base", base, "--output", merged]
        line = refusal(capfd, [*merge, "--push-to-hub", "me/merged"])
        assert f"try again with: phi3-jax export {merged} --push-to-hub me/merged" in line
        hub.down.clear()
        assert main(["export", str(merged), "--push-to-hub", "me/merged"]) == 0
        assert set(hub.models["me/merged"]["main"]) - {".gitattributes"} == {path.name for path in merged.iterdir()}
        assert b"library_name: transformers" in hub.models["me/merged"]["main"]["README.md"]
        assert hub.token not in "".join(path.read_text(errors="ignore") for path in merged.iterdir())


def test_options_that_contradict(adapter, tmp_path, capfd):
    for options, found in {
        (): "expected one of --merge, --portable and --push-to-hub",
        ("--merge",): "--output is not given",
        ("--merge", "--output", tmp_path / "x", "--private"): "--private is for --push-to-hub",
        ("--push-to-hub", "me/x", "--output", tmp_path / "x"): "--output is for --merge and --portable",
        ("--push-to-hub", "me/x", "--revision", "a", "--hub-revision", "b"): "give one",
    }.items():
        assert found in refusal(capfd, ["export", adapter, *options])
