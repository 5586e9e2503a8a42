"""Tokenizers of checkpoints."""

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from phi3_jax import InputError
from phi3_jax.hf.tokenizer import load_tokenizer

TEXTS = ("Hello world", "<|user|>\nHi <|end|>\n<|assistant|>\n It's", "  two", "a\n\nb", "分析 é", "")


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


@pytest.fixture
def phi3(testdata):
    return testdata / "models" / "phi-3-mini-4k-instruct"


def test_published_ids(testdata):
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
def test_ids_are_those_of_tokenizer_json_whatever_lies_beside_it(testdata, phi3, tmp_path, beside):
    copy_tokenizer(phi3, tmp_path)
    if beside != "nothing":
        config = phi3 if beside == "config.json" else testdata / "models" / "phi-3-medium-128k-instruct"
        (tmp_path / "config.json").write_bytes((config / "config.json").read_bytes())
    plain = Tokenizer.from_file(str(phi3 / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path)
    assert len(tokenizer) == 32011
    for text in TEXTS:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert ids == plain.encode(text, add_special_tokens=False).ids, text


def test_special_tokens_and_template_are_the_checkpoints(phi3):
    tokenizer = load_tokenizer(phi3)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 32000, 32000)
    assert tokenizer.chat_template == json.loads((phi3 / "tokenizer_config.json").read_text())["chat_template"]


def test_stored_padding_and_truncation_are_dropped(phi3, tmp_path):
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


def test_bos_as_tokenizer_config_says(testdata, phi3, tmp_path):
    assert load_tokenizer(phi3)("a")["input_ids"] == [1, 263]
    assert load_tokenizer(phi3)("a", "a")["input_ids"] == [1, 263, 1, 263]
    without = copy_tokenizer(phi3, tmp_path / "without", add_bos_token=False)
    assert load_tokenizer(without)("a")["input_ids"] == [263]
    # tokenizer.json prepends it already here: once is enough.
    stories = load_tokenizer(testdata / "checkpoints" / "stories260K")
    assert stories("a")["input_ids"].count(stories.bos_token_id) == 1


def test_saved_tokenizer_loads_the_same(phi3, tmp_path):
    tokenizer = load_tokenizer(phi3)
    tokenizer.save_pretrained(tmp_path)
    again = load_tokenizer(tmp_path)
    assert again.chat_template == tokenizer.chat_template
    for text in TEXTS:
        assert again(text)["input_ids"] == tokenizer(text)["input_ids"]


def test_no_tokenizer(tmp_path):
    with pytest.raises(InputError, match=r"no tokenizer\.json"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("text", ["{", "[]", '{"model": 3}'])
def test_broken_tokenizer(testdata, tmp_path, name, text):
    copy_tokenizer(testdata / "checkpoints" / "stories260K", tmp_path)
    (tmp_path / name).write_text(text)
    if name == "tokenizer_config.json" and text.startswith('{"'):
        load_tokenizer(tmp_path)  # says nothing, which is allowed
        return
    with pytest.raises(InputError) as caught:
        load_tokenizer(tmp_path)
    assert "\n" not in str(caught.value)
