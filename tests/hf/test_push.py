"""Uploads to a hub on the loopback interface."""

from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import constants

from phi3_jax import InputError
from phi3_jax.config.hub_options import PushTarget
from phi3_jax.hf.push import HubRepository, PushError, push_to_hub, uploaded
from tests.helpers.model_hub import TOKEN, taking_uploads


@pytest.fixture
def hub(monkeypatch):
    with taking_uploads(monkeypatch) as server:
        yield server


@pytest.fixture
def adapter(tmp_path) -> Path:
    folder = tmp_path / "adapter"
    (folder / "state").mkdir(parents=True)
    for name in ("adapter_config.json", "adapter_model.safetensors", "README.md", "tokenizer.json", "optimizer.pt"):
        (folder / name).write_text(f"{{}} {name}" if name != "README.md" else "# card")
    (folder / "state" / "array").write_text("0")
    return folder


def test_an_adapter_goes_up_with_its_card_and_nothing_else(hub, adapter):
    repository = HubRepository.open(PushTarget("adapter", private=True))
    assert repository.url == f"{hub.url}/me/adapter"
    assert hub.made in ({"me/adapter": True}, {"me/adapter": "private"})
    assert repository.upload(adapter, "first") == ["optimizer.pt", "state/array"]
    there = hub.models["me/adapter"]["main"]
    assert set(there) - {".gitattributes"} == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "tokenizer.json",
    }
    assert there["adapter_model.safetensors"] == (adapter / "adapter_model.safetensors").read_bytes()
    assert hub.messages == ["first"]


def test_in_python(hub, adapter):
    assert push_to_hub(adapter, "adapter", commit_message="mine") == f"{hub.url}/me/adapter"
    assert hub.messages == ["mine"]


def test_no_repository_is_made_for_a_folder_with_nothing_to_upload(hub, adapter):
    with pytest.raises(InputError, match="state: holds neither an adapter nor a model"):
        push_to_hub(adapter / "state", "adapter")
    assert not hub.models


def test_a_branch_and_a_folder_in_it(hub, adapter):
    repository = HubRepository.open(PushTarget("acme/adapter", revision="v2"))
    repository.upload(adapter, "all", to="last-checkpoint", everything=True)
    assert "last-checkpoint/state/array" in hub.models["acme/adapter"]["v2"]
    (adapter / "state/array").rename(adapter / "state/other")  # arrays have other names every time
    repository.upload(adapter, "again", to="last-checkpoint", everything=True)
    there = [name for name in hub.models["acme/adapter"]["v2"] if "state" in name]
    assert there == ["last-checkpoint/state/other"]
    assert set(hub.models["acme/adapter"]["main"]) == {".gitattributes"}
    assert repository.url.endswith("/acme/adapter/tree/v2")
    HubRepository.open(PushTarget("acme/adapter", revision="v2"))  # both are there by now


def test_an_upload_that_was_cut_off_goes_on(hub, adapter):
    repository = HubRepository.open(PushTarget("me/adapter"))
    hub.down["/api/models/me/adapter/commit"] = 403
    with pytest.raises(PushError, match=r"me/adapter: the token may not write there"):
        repository.upload(adapter, "first")
    hub.down.clear()
    repository.upload(adapter, "second")
    assert hub.sent == 1  # the weights were there already
    assert hub.messages == ["second"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("a/b/c", "no id of a repository"),
        ("me/a--b", "no id of a repository"),
        ("you/adapter", "you is neither you, me, nor an organisation of yours"),
        ("readers/adapter", "you may only read in readers"),
    ],
)
def test_names_that_cannot_be_uploaded_to(hub, name, message):
    with pytest.raises(InputError, match=message):
        HubRepository.open(PushTarget(name))
    assert not hub.models


def test_tokens(hub, monkeypatch, tmp_path):
    hub.role = "read"
    with pytest.raises(InputError, match="may only read"):
        HubRepository.open(PushTarget("me/x"))
    monkeypatch.setenv("HF_TOKEN", "hf_another_one_that_is_wrong")
    with pytest.raises(InputError, match="the token is not valid") as caught:
        HubRepository.open(PushTarget("me/x"))
    assert "hf_another" not in str(caught.value)
    hub.role = "write"
    HubRepository.open(PushTarget("me/x", token=TOKEN))  # the one given comes first
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    assert huggingface_hub.get_token() is None
    with pytest.raises(InputError, match=r"no token to upload with; log in \(`hf auth login`\), or set HF_TOKEN"):
        HubRepository.open(PushTarget("me/x"))


def test_no_network(hub, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(InputError, match="me/x: the hub is not reachable") as caught:
        HubRepository.open(PushTarget("me/x"))
    assert "\n" not in str(caught.value)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match="HF_HUB_OFFLINE is set"):
        HubRepository.open(PushTarget("me/x"))


def test_what_is_no_adapter_and_links_out_of_it(hub, adapter, tmp_path):
    repository = HubRepository.open(PushTarget("me/adapter"))
    with pytest.raises(InputError, match="neither an adapter nor a model"):
        repository.upload(tmp_path, "nothing")
    assert not uploaded(tmp_path)
    (tmp_path / "secret").write_text("secret")
    (adapter / "LICENSE").symlink_to(tmp_path / "secret")
    with pytest.raises(InputError, match="LICENSE"):
        repository.upload(adapter, "link")
    assert not hub.messages
