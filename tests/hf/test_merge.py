"""Base and adapter merged from file to file."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from phi3_jax import InputError
from phi3_jax.hf.checkpoint import Checkpoint
from phi3_jax.hf.merge import save_merged
from phi3_jax.hf.save import save_model
from phi3_jax.lora import merge_lora
from tests.helpers.models import random_lora, smallest_model
from tests.helpers.shards import bits

KINDS = {
    "plain": {"target_modules": ["qkv_proj", "down_proj"]},
    "slices": {"target_modules": ["q_proj", "v_proj", "up_proj"], "layers_to_transform": [0, 2]},
    "dora": {"target_modules": ["o_proj", "gate_up_proj", "embed_tokens"], "use_dora": True},
    "ends": {"target_modules": ["o_proj", "lm_head", "embed_tokens"]},
    "rows": {"target_modules": ["o_proj"], "trainable_token_indices": [3, 5]},
    "whole": {"target_modules": ["o_proj"], "modules_to_save": ["lm_head", "down_proj"]},
}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_it_is_the_merged_model_in_float32_rounded_once(tmp_path, kind, tied):
    model = smallest_model(tie_word_embeddings=tied)
    save_model(model, tmp_path / "base", max_shard_size=4_000)
    lora = random_lora(model, **KINDS[kind])
    base = Checkpoint.open(tmp_path / "base")
    merged = merge_lora(model, lora)
    save_model(merged, tmp_path / "wide")
    for dtype in (None, "bfloat16"):
        folder = tmp_path / str(dtype)
        save_merged(base, lora, folder, dtype=dtype)
        found, expected = load_file(folder / "model.safetensors"), load_file(tmp_path / "wide/model.safetensors")
        assert list(found) == list(expected)
        for name, weight in expected.items():
            np.testing.assert_array_equal(found[name], weight.astype(found[name].dtype), err_msg=name)
        assert {str(weight.dtype) for weight in found.values()} == {dtype or "float32"}
        config = json.loads((folder / "config.json").read_text())
        assert config == json.loads((tmp_path / "wide/config.json").read_text()) | {"torch_dtype": dtype or "float32"}
    assert bits(Checkpoint.open(tmp_path / "None").load_model(dtype=jnp.float32)) == bits(merged)


def test_what_is_not_finite_is_named_and_nothing_is_written(tmp_path):
    model = smallest_model()
    save_model(model, tmp_path / "base")
    lora = random_lora(model, target_modules=["down_proj"], lora_alpha=1e7)
    with pytest.raises(InputError, match=r"layers\.0\.mlp\.down_proj\.weight.*infinity in float16.*65504"):
        save_merged(Checkpoint.open(tmp_path / "base"), lora, tmp_path / "out", dtype="float16")
    broken = jax.tree.map(lambda array: array.at[1].set(jnp.inf), lora)
    with pytest.raises(InputError, match=r"layers\.mlp\.down_proj: the merged weight holds NaN"):
        merge_lora(model, broken)
    assert not list((tmp_path / "out").glob("*"))


def test_a_base_whose_config_names_no_type_is_what_its_tensors_are(tmp_path):
    for dtype in (jnp.float32, jnp.float16, jnp.bfloat16):
        folder = tmp_path / jnp.dtype(dtype).name
        model = smallest_model(dtype)
        save_model(model, folder)
        raw = json.loads((folder / "config.json").read_text())
        assert Checkpoint.open(folder).stored_dtype == raw.pop("torch_dtype") == folder.name
        (folder / "config.json").write_text(json.dumps(raw))
        assert Checkpoint.open(folder).stored_dtype == folder.name
        save_merged(Checkpoint.open(folder), random_lora(model, target_modules=["o_proj"]), tmp_path / "out")
        assert json.loads((tmp_path / "out/config.json").read_text())["torch_dtype"] == folder.name


def test_a_base_that_is_not_finite(tmp_path):
    model = smallest_model()
    save_model(model, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.norm.weight"][3] = np.nan
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=r"model\.norm\.weight"):
        save_merged(Checkpoint.open(tmp_path), random_lora(model), tmp_path / "out")
