"""The packaged base model: small, complete, and one that transformers loads too."""

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open

from phi3_jax import Phi3ForCausalLM
from phi3_jax.demo import demo_path
from phi3_jax.hf.tokenizer import load_tokenizer

CHAT = [{"role": "user", "content": "Hi, could you send 12 red mugs to Oslo by Friday? – Zoë"}]


@pytest.fixture(scope="module")
def base() -> Path:
    return demo_path("base")


@pytest.fixture(scope="module")
def tokenizer(base):
    return load_tokenizer(base)


def test_everything_fits_in_four_megabytes(base):
    assert sum(file.stat().st_size for file in base.iterdir()) <= 4_000_000


def test_weights_are_float16(base):
    with safe_open(base / "model.safetensors", framework="np") as file:
        dtypes = {file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118 (not a dict)
    assert dtypes == {"F16"}


def test_text_comes_back_from_its_tokens(tokenizer):
    text = CHAT[0]["content"]
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert max(ids) < 1024
    assert tokenizer.unk_token_id not in ids


def test_the_template_is_that_of_phi3(tokenizer):
    text = tokenizer.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)
    assert text == f"<|user|>\n{CHAT[0]['content']}<|end|>\n<|assistant|>\n"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    special = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    found = [token for token in tokenizer.convert_ids_to_tokens(ids) if token in special]
    assert found == ["<|user|>", "<|end|>", "<|assistant|>"]


def test_generation_ends_at_the_end_of_a_turn(base, tokenizer):
    ends = json.loads((base / "generation_config.json").read_text())["eos_token_id"]
    assert tokenizer.convert_ids_to_tokens(ends) == ["<|endoftext|>", "<|end|>"]


def test_transformers_loads_it_and_gives_the_same_logits(base, tokenizer):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    ours = Phi3ForCausalLM.from_pretrained(str(base), dtype=jnp.float32)
    auto = transformers.AutoTokenizer.from_pretrained(base)
    text = tokenizer.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)
    ids = np.asarray(tokenizer([text])["input_ids"], np.int32)
    assert auto([text])["input_ids"] == ids.tolist()
    with torch.no_grad():
        expected = theirs(torch.tensor(ids.astype(np.int64))).logits.numpy()
    got = np.asarray(ours(jnp.asarray(ids)))
    # float32 on both sides; only the order of sums differs.
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
