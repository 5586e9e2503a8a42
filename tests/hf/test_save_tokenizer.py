"""Tokenizers beside adapters and models. (Read by transformers 4.57, too, when this was written.)"""

import json
import shutil
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from phi3_jax import InputError, load_tokenizer
from phi3_jax.hf.save_tokenizer import save_merged_tokenizer, save_tokenizer
from tests.helpers.tokenizers import APRIL, JULY, phi3_tokenizer
from tests.helpers.worlds import contents

TEXT = "<|user|>\nthe 12 <|end|>\n the"


@pytest.fixture
def base(tmp_path) -> Path:
    """As Microsoft's: a class of Llama, a sentencepiece model, a licence, odd spacing in the files."""
    folder = tmp_path / "base"
    phi3_tokenizer(JULY).save_pretrained(folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "chat_template.jinja").unlink()
    changes = {"tokenizer_class": "LlamaTokenizer", "chat_template": JULY}
    (folder / "tokenizer_config.json").write_text(json.dumps(config | changes, indent=7))
    (folder / "tokenizer.json").write_text((folder / "tokenizer.json").read_text() + "\n\n")
    for name in ("tokenizer.model", "added_tokens.json", "LICENSE", "NOTICE.md"):
        (folder / name).write_text("{}")
    return folder


def config_of(folder: Path) -> dict:
    return json.loads((folder / "tokenizer_config.json").read_text())


def test_a_models_folder_has_the_files_byte_for_byte(base, tmp_path):
    save_tokenizer(load_tokenizer(base), tmp_path / "model", licence=True)
    assert contents(tmp_path / "model") == contents(base)


def test_in_an_adapters_folder_the_class_is_one_that_needs_no_config_beside(base, tmp_path):
    save_tokenizer(load_tokenizer(base), tmp_path / "adapter")
    found, there = contents(tmp_path / "adapter"), contents(base)
    for name in ("LICENSE", "NOTICE.md", "tokenizer_config.json"):
        del there[name]
    config = config_of(tmp_path / "adapter")
    del found["tokenizer_config.json"]
    assert found == there
    assert config == config_of(base) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    expected = load_tokenizer(base)
    assert AutoTokenizer.from_pretrained(tmp_path / "adapter").encode(TEXT) == expected.encode(TEXT)


def test_the_start_token_that_only_a_setting_asks_for_stands_in_the_file(base, tmp_path):
    (base / "tokenizer_config.json").write_text(json.dumps(config_of(base) | {"add_bos_token": True}))
    tokenizer = load_tokenizer(base)
    save_tokenizer(tokenizer, tmp_path / "adapter")
    ids = AutoTokenizer.from_pretrained(tmp_path / "adapter").encode(TEXT)
    assert ids == tokenizer.encode(TEXT)
    assert ids[0] == tokenizer.bos_token_id
    before, after = (json.loads((folder / "tokenizer.json").read_text()) for folder in (base, tmp_path / "adapter"))
    assert {name for name in before if before[name] != after[name]} == {"post_processor"}


@pytest.mark.parametrize("template", [APRIL, {"default": APRIL, "tool_use": JULY}, None])
def test_another_template_takes_the_place_of_the_one_there(base, tmp_path, template):
    tokenizer = load_tokenizer(base)
    tokenizer.chat_template = template
    save_tokenizer(tokenizer, tmp_path / "model", licence=True)
    assert load_tokenizer(tmp_path / "model").chat_template == template
    first = template["default"] if isinstance(template, dict) else template
    assert config_of(tmp_path / "model").get("chat_template") == first
    same = contents(base).items() & contents(tmp_path / "model").items()
    assert {name for name, _ in same} == set(contents(base)) - {"tokenizer_config.json"}


def test_a_changed_one_is_saved_so_that_transformers_4_reads_it(base, tmp_path):
    tokenizer = load_tokenizer(base)
    tokenizer.pad_token, tokenizer.padding_side = tokenizer.bos_token, "left"
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|mine|>"]})
    save_tokenizer(tokenizer, tmp_path / "adapter")
    config = config_of(tmp_path / "adapter")
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert config["additional_special_tokens"] == ["<|mine|>"]
    assert not {"extra_special_tokens", "backend", "is_local"} & set(config)
    again = load_tokenizer(tmp_path / "adapter")
    assert again.encode(TEXT + "<|mine|>") == tokenizer.encode(TEXT + "<|mine|>")
    assert (again.pad_token, again.padding_side) == (tokenizer.bos_token, "left")
    # The vocabulary is that of the base.
    assert (tmp_path / "adapter/tokenizer.model").read_bytes() == (base / "tokenizer.model").read_bytes()


def test_one_that_no_folder_has(tmp_path):
    save_tokenizer(phi3_tokenizer(JULY), tmp_path / "adapter")
    assert load_tokenizer(tmp_path / "adapter").encode(TEXT) == phi3_tokenizer(JULY).encode(TEXT)
    assert config_of(tmp_path / "adapter")["tokenizer_class"] == "PreTrainedTokenizerFast"


class TestMerged:
    def test_the_bases_files_and_the_adapters_template(self, base, tmp_path):
        adapter, merged = tmp_path / "adapter", tmp_path / "merged"
        merged.mkdir()
        # As TRL leaves it: saved anew by transformers 5, without a sentencepiece model.
        tokenizer = load_tokenizer(base)
        tokenizer.save_pretrained(adapter)
        save_merged_tokenizer(base, adapter, merged)
        assert contents(merged) == contents(base)
        tokenizer.chat_template = APRIL
        tokenizer.save_pretrained(adapter)
        save_merged_tokenizer(base, adapter, merged)
        assert load_tokenizer(merged).chat_template == APRIL
        assert (merged / "tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()

    def test_an_adapters_own_tokenizer(self, base, tmp_path):
        adapter, merged = tmp_path / "adapter", tmp_path / "merged"
        merged.mkdir()
        tokenizer = load_tokenizer(base)
        tokenizer.pad_token = tokenizer.bos_token
        tokenizer.save_pretrained(adapter)
        save_merged_tokenizer(base, adapter, merged)
        assert load_tokenizer(merged).pad_token == tokenizer.bos_token
        assert contents(merged).keys() >= {"tokenizer.model", "LICENSE"}
        (adapter / "tokenizer.json").write_text("{}")  # the base's in its place would be another
        with pytest.raises(InputError, match=r"adapter: its tokenizer cannot be read"):
            save_merged_tokenizer(base, adapter, merged)

    def test_neither_or_a_template_alone(self, base, tmp_path):
        adapter, merged = tmp_path / "adapter", tmp_path / "merged"
        adapter.mkdir()
        merged.mkdir()
        save_merged_tokenizer(base, adapter, merged)
        assert contents(merged) == contents(base)
        (adapter / "chat_template.jinja").write_text(APRIL)
        save_merged_tokenizer(base, adapter, merged)
        assert load_tokenizer(merged).chat_template == APRIL
        shutil.rmtree(merged)
        merged.mkdir()
        save_merged_tokenizer(tmp_path / "adapter", tmp_path / "adapter", merged)
        assert set(contents(merged)) == {"chat_template.jinja"}
