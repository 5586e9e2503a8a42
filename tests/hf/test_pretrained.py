"""`from_pretrained` and `save_pretrained`: to files and back."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from phi3_jax import InputError, Phi3ForCausalLM, load_tokenizer
from tests.helpers.models import smallest_model


def test_there_and_back(tmp_path):
    model = smallest_model()
    model.save_pretrained(str(tmp_path))
    loaded = Phi3ForCausalLM.from_pretrained(str(tmp_path), dtype=jnp.float32)
    ids = jnp.array([[3, 4, 5]])
    np.testing.assert_array_equal(jax.jit(loaded)(ids), jax.jit(model)(ids))
    assert Phi3ForCausalLM.from_pretrained(str(tmp_path)).dtype == jnp.bfloat16


def test_a_call_of_transformers_carried_over(tmp_path, capsys):
    torch = pytest.importorskip("torch")
    (tmp_path / "sub").mkdir()
    smallest_model().save_pretrained(tmp_path / "sub")
    load = Phi3ForCausalLM.from_pretrained
    model = load(
        tmp_path,
        subfolder="sub",
        torch_dtype=torch.float16,
        trust_remote_code=True,
        device_map=None,
        attn_implementation="eager",
        use_auth_token=None,
        force_download=False,
    )
    assert model.dtype == jnp.float16
    said = capsys.readouterr().out
    assert [line.partition("=")[0] for line in said.splitlines()] == ["trust_remote_code", "attn_implementation"]
    config = tmp_path / "sub" / "config.json"
    for stored in ("float16", "float32"):
        config.write_text(json.dumps({**json.loads(config.read_text()), "dtype": stored}))
        assert load(tmp_path / "sub", dtype="auto").dtype == stored
    config.write_text(json.dumps({**json.loads(config.read_text()), "dtype": None, "torch_dtype": None}))
    assert load(tmp_path / "sub", dtype="auto").dtype == jnp.float32  # what the tensors are
    with pytest.raises(InputError, match="dtype is 'float32' and torch_dtype 'bfloat16'"):
        load(tmp_path, dtype="float32", torch_dtype=torch.bfloat16)
    with pytest.raises(InputError, match="load_in_4bit is given beside quantization_config"):
        load(tmp_path, load_in_4bit=True, quantization_config={"load_in_4bit": True})
    with pytest.raises(InputError, match="subfolder is sub, and of microsoft/phi only the top folder is read"):
        load("microsoft/phi", subfolder="sub")
    with pytest.raises(
        TypeError, match=r"from_pretrained\(\) got output_loading_info=True, which .* dtype, quantization"
    ):
        load(tmp_path, output_loading_info=True)
    with pytest.raises(TypeError, match=r"load_tokenizer\(\) got padding_side='left'"):
        load_tokenizer(tmp_path, padding_side="left", use_fast=True)


@pytest.mark.parametrize("name", ["double_quant", "local_files_only"])
def test_a_word_is_no_switch(name):
    with pytest.raises(InputError, match=f"{name} is 'no', expected true or false"):
        Phi3ForCausalLM.from_pretrained("base", **{name: "no"})
