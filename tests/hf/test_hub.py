"""Hub ids against a server on the loopback interface, and tokenizers."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from phi3_jax import InputError
from phi3_jax.hf.hub import load_tokenizer, resolve_checkpoint
from tests.hf.hub_server import Hub, serve
from tests.hf.test_checkpoint import TINY, tiny_model

# huggingface_hub reads its environment when it is imported: every look-up gets a process of its own,
# or rather every environment. A call is a list of keyword arguments; errors come back as text.
SCRIPT = """
import json, sys
from phi3_jax import InputError
from phi3_jax.hf.hub import resolve_checkpoint
for arguments in json.loads(sys.argv[1]):
    loads = arguments.pop("load", False)
    try:
        folder = resolve_checkpoint(**arguments)
        if loads:
            from phi3_jax import Phi3ForCausalLM
            arguments.pop("patterns", None)
            Phi3ForCausalLM.from_pretrained(**arguments)
        files = [path for path in folder.rglob("*") if path.is_file()]
        answer = {"files": {str(path.relative_to(folder)): path.read_bytes().decode("latin1") for path in files}}
    except InputError as error:
        answer = {"error": str(error)}
    print("ANSWER " + json.dumps(answer))
"""


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("model")
    tiny_model().save_pretrained(str(folder), max_shard_size=10_000)
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.fixture(scope="module")
def hub(weights):
    unwanted = {
        "pytorch_model.bin": b"pickle",
        "modeling_phi3.py": b"raise SystemExit",
        "README.md": b"",
        "onnx/config.json": b"{}",
        "checkpoint-1/model.safetensors": b"",
    }
    old = {"config.json": json.dumps(TINY | {"vocab_size": 7}).encode()}
    models = {
        "someone/tiny-phi3": {"main": weights | unwanted | {"tokenizer.model": b"x"}, "v0": old},
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
        assert files == weights | {"tokenizer.model": b"x"}  # no pickle, no code, no subfolder
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


def copy_tokenizer(source: Path, target: Path, *, change=None, **config) -> Path:
    """tokenizer.json and tokenizer_config.json of `source`, the first changed by `change`."""
    target.mkdir(exist_ok=True)
    raw = json.loads((source / "tokenizer.json").read_text())
    if change is not None:
        change(raw)
    (target / "tokenizer.json").write_text(json.dumps(raw))
    old = json.loads((source / "tokenizer_config.json").read_text())
    (target / "tokenizer_config.json").write_text(json.dumps(old | config))
    return target


class TestTokenizer:
    TEXTS = ("Hello world", "<|user|>\nHi <|end|>\n<|assistant|>\n It's", "  two", "a\n\nb", "分析 é", "")

    @pytest.fixture
    def phi3(self, testdata):
        return testdata / "models" / "phi-3-mini-4k-instruct"

    def test_published_ids(self, testdata):
        raw = json.loads((testdata / "tokenizer_vectors" / "onnxruntime-extensions_phi3.json").read_text())
        old = load_tokenizer(testdata / "models" / "phi-3-mini-4k-instruct")
        new = load_tokenizer(testdata / "models" / "phi-3.5-mini-instruct")
        checked = 0
        for case in raw["cases"]:
            # One library's variant of the vocabulary, in which <|user|> does not swallow a newline.
            if "rstrip-false" in case["tokenizer"] and "<|user|>" in case["text"]:
                continue
            checked += 1
            # The first release says add_bos_token, the later ones do not.
            tokenizer = old if case["add_bos"] else new
            assert tokenizer(case["text"])["input_ids"] == case["ids"]
        assert checked == 3

    @pytest.mark.parametrize("beside", ["config.json", "an older config.json", "nothing"])
    def test_ids_are_those_of_tokenizer_json_whatever_lies_beside_it(self, testdata, phi3, tmp_path, beside):
        copy_tokenizer(phi3, tmp_path)
        if beside != "nothing":
            config = phi3 if beside == "config.json" else testdata / "models" / "phi-3-medium-128k-instruct"
            (tmp_path / "config.json").write_bytes((config / "config.json").read_bytes())
        plain = Tokenizer.from_file(str(phi3 / "tokenizer.json"))
        tokenizer = load_tokenizer(tmp_path)
        assert len(tokenizer) == 32011
        for text in self.TEXTS:
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            assert ids == plain.encode(text, add_special_tokens=False).ids, text

    def test_special_tokens_and_template_are_the_checkpoints(self, phi3):
        tokenizer = load_tokenizer(phi3)
        assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 32000, 32000)
        assert tokenizer.chat_template == json.loads((phi3 / "tokenizer_config.json").read_text())["chat_template"]

    def test_stored_padding_and_truncation_are_dropped(self, phi3, tmp_path):
        def store(raw):
            raw["truncation"] = {"direction": "Right", "max_length": 5, "strategy": "LongestFirst", "stride": 0}
            raw["padding"] = {
                "strategy": {"Fixed": 40},
                "direction": "Left",
                "pad_to_multiple_of": None,
                "pad_id": 32000,
                "pad_type_id": 0,
                "pad_token": "<|endoftext|>",
            }

        tokenizer = load_tokenizer(copy_tokenizer(phi3, tmp_path, change=store))
        plain = Tokenizer.from_file(str(phi3 / "tokenizer.json"))
        for text in ("Hello", "a b c d e f g h i"):
            expected = plain.encode(text, add_special_tokens=False).ids
            assert tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids == expected
            assert tokenizer(text, add_special_tokens=False)["input_ids"] == expected

    def test_bos_as_tokenizer_config_says(self, testdata, phi3, tmp_path):
        assert load_tokenizer(phi3)("a")["input_ids"] == [1, 263]
        assert load_tokenizer(phi3)("a", "a")["input_ids"] == [1, 263, 1, 263]
        without = copy_tokenizer(phi3, tmp_path / "without", add_bos_token=False)
        assert load_tokenizer(without)("a")["input_ids"] == [263]
        # tokenizer.json prepends it already here: once is enough.
        stories = load_tokenizer(testdata / "checkpoints" / "stories260K")
        assert stories("a")["input_ids"].count(stories.bos_token_id) == 1

    def test_saved_tokenizer_loads_the_same(self, phi3, tmp_path):
        tokenizer = load_tokenizer(phi3)
        tokenizer.save_pretrained(tmp_path)
        again = load_tokenizer(tmp_path)
        assert again.chat_template == tokenizer.chat_template
        for text in self.TEXTS:
            assert again(text)["input_ids"] == tokenizer(text)["input_ids"]

    def test_no_tokenizer(self, tmp_path):
        with pytest.raises(InputError, match=r"no tokenizer\.json"):
            load_tokenizer(tmp_path)

    @pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
    @pytest.mark.parametrize("text", ["{", "[]", '{"model": 3}'])
    def test_broken_tokenizer(self, testdata, tmp_path, name, text):
        copy_tokenizer(testdata / "checkpoints" / "stories260K", tmp_path)
        (tmp_path / name).write_text(text)
        if name == "tokenizer_config.json" and text.startswith('{"'):
            load_tokenizer(tmp_path)  # says nothing, which is allowed
            return
        with pytest.raises(InputError) as caught:
            load_tokenizer(tmp_path)
        assert "\n" not in str(caught.value)
