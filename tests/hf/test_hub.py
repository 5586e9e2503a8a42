"""Hub ids against a server on the loopback interface, and local paths."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from phi3_jax import InputError
from phi3_jax.hf.hub import resolve_checkpoint
from tests.helpers.checkpoints import RAW, model_of
from tests.helpers.model_hub import Hub, serve

# huggingface_hub reads its environment when it is imported: every look-up gets a process of its own,
# or rather every environment. A call is a list of keyword arguments; errors come back as text.
SCRIPT = """
import json, sys
from phi3_jax import InputError
from phi3_jax.config.hub_options import Hub
from phi3_jax.hf.hub import resolve_checkpoint
OPTIONS = ("revision", "token", "cache_dir", "local_files_only")
for arguments in json.loads(sys.argv[1]):
    loads = arguments.pop("load", False)
    options = {name: arguments.pop(name) for name in OPTIONS if name in arguments}
    try:
        folder = resolve_checkpoint(**arguments, hub=Hub(**options))
        if loads:
            from phi3_jax import Phi3ForCausalLM
            arguments.pop("patterns", None)
            Phi3ForCausalLM.from_pretrained(**arguments, **options)
        files = [path for path in folder.rglob("*") if path.is_file()]
        answer = {"files": {str(path.relative_to(folder)): path.read_bytes().decode("latin1") for path in files}}
    except InputError as error:
        answer = {"error": str(error)}
    print("ANSWER " + json.dumps(answer))
"""

TOKENIZER = {"tokenizer.model": b"x", "additional_chat_templates/tool_use.jinja": b"{{ messages }}"}


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("model")
    model_of().save_pretrained(str(folder), max_shard_size=10_000)
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.fixture(scope="module")
def hub(weights):
    unwanted = {
        "pytorch_model.bin": b"pickle",
        "modeling_phi3.py": b"raise SystemExit",
        "README.md": b"",
        "onnx/config.json": b"{}",
        "checkpoint-1/model.safetensors": b"",
        "adapter/adapter_config.json": b"{}",
    }
    old = {"config.json": json.dumps(RAW | {"vocab_size": 7}).encode()}
    models = {
        "someone/tiny-phi3": {"main": weights | unwanted | TOKENIZER, "v0": old},
        "someone/private": {"main": weights},
        "someone/gated": {"main": weights},
    }
    with serve(Hub(models, private=("someone/private",), gated=("someone/gated",))) as server:
        yield server


def ask(hub: Hub, home: Path, calls: list[dict], **environment: str) -> list[dict]:
    """Answers to calls of `resolve_checkpoint` in a process whose cache is under `home`."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING_FACE"))}
    settings = {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "NO_PROXY": "127.0.0.1"}
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps(calls)],
        env=inherited | settings | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    answers = [json.loads(line[7:]) for line in result.stdout.splitlines() if line.startswith("ANSWER ")]
    assert len(answers) == len(calls)
    for answer in answers:
        assert "\n" not in answer.get("error", "")
    return answers


def call(name: str, **arguments: object) -> dict:
    return {"path_or_hub_id": name, **arguments}


class TestHub:
    def test_what_is_downloaded_cached_and_loaded(self, hub, weights, tmp_path):
        (answer,) = ask(hub, tmp_path, [call("someone/tiny-phi3", load=True)])
        files = {name: text.encode("latin1") for name, text in answer["files"].items()}
        assert files == weights | TOKENIZER  # no pickle, no code, no other subfolder
        assert not any(name in request for request in hub.requests for name in (".bin", ".py", "onnx"))

        # A second process finds all of it without the hub, by either way of being offline.
        offline = [call("someone/tiny-phi3", local_files_only=True, load=True), call("someone/tiny-phi3")]
        assert ask(hub, tmp_path, offline, HF_ENDPOINT="http://127.0.0.1:9", HF_HUB_OFFLINE="1") == [answer, answer]

    def test_revisions_and_cache_folders(self, hub, tmp_path):
        name, cache = "someone/tiny-phi3", tmp_path / "elsewhere"
        commit = hub.commit(name, "v0")
        asked = [
            call(name, revision="v0", cache_dir=str(cache)),
            call(name, revision=commit, cache_dir=str(cache), local_files_only=True),
            call(name, cache_dir=str(cache), local_files_only=True),
            call(name, revision="nightly"),
            call(name, patterns=["config.json"]),
        ]
        old, same, not_cached, unknown, pattern = ask(hub, tmp_path / "home", asked)
        assert json.loads(old["files"]["config.json"])["vocab_size"] == 7
        assert same == old
        assert (cache / "models--someone--tiny-phi3").is_dir()
        assert "cache" in not_cached["error"]
        assert "at revision nightly" in unknown["error"]
        assert set(pattern["files"]) == {"config.json"}

    def test_closed_and_unknown_models(self, hub, weights, tmp_path):
        asked = [
            call("someone/private"),
            call("someone/gated"),
            call("someone/no-such-model"),
            call("someone/private", token="hf_wrong"),
            call("someone/private", token=hub.token),
            call("someone/gated", token=hub.token),
        ]
        private, gated, unknown, wrong, *open_ = ask(hub, tmp_path, asked)
        assert "someone/private" in private["error"]
        assert "log in" in private["error"]
        assert "restricted" in gated["error"]
        assert "terms" in gated["error"]
        assert "no such folder here, and no such model" in unknown["error"]
        assert "log in" in wrong["error"]
        for answer in open_:
            assert set(answer["files"]) == set(weights)

    def test_token_from_the_environment(self, hub, weights, tmp_path):
        (answer,) = ask(hub, tmp_path, [call("someone/private")], HF_TOKEN=hub.token)
        assert set(answer["files"]) == set(weights)

    @pytest.mark.parametrize("environment", [{"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": "http://127.0.0.1:9"}])
    def test_neither_cached_nor_reachable(self, hub, tmp_path, environment):
        (answer,) = ask(hub, tmp_path, [call("someone/tiny-phi3")], **environment)
        assert answer["error"].startswith("someone/tiny-phi3: ")
        assert "not reachable" in answer["error"]


class TestPaths:
    def test_a_folder_is_itself(self, tmp_path, monkeypatch):
        assert resolve_checkpoint(tmp_path) == tmp_path
        monkeypatch.setenv("HOME", str(tmp_path.parent))
        assert resolve_checkpoint(f"~/{tmp_path.name}") == tmp_path

    @pytest.mark.parametrize(
        "name", ["/no/such/folder", "./nothing", "../x", "a/b/c", "~/nothing", "", "a b", "x/", "-x/y"]
    )
    def test_what_is_neither_folder_nor_hub_id(self, name, monkeypatch, tmp_path):
        monkeypatch.chdir(tmp_path)
        with pytest.raises(InputError, match="no such folder, and no hub id"):
            resolve_checkpoint(name or "/nowhere/at/all")

    @pytest.mark.parametrize("name", ["a--b/c", "owner/name.git", "x" * 200])
    def test_ids_that_the_hub_does_not_allow(self, name):
        with pytest.raises(InputError, match="no valid hub id"):
            resolve_checkpoint(name)

    def test_a_file_is_no_checkpoint(self, tmp_path):
        file = tmp_path / "model.safetensors"
        file.write_bytes(b"")
        with pytest.raises(InputError, match="is a file"):
            resolve_checkpoint(file)
