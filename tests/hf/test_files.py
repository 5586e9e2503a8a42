"""Everything that can be wrong with the files of a checkpoint."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open

from phi3_jax import InputError
from phi3_jax.hf.checkpoint import Checkpoint
from tests.helpers.checkpoints import RAW
from tests.helpers.shards import FIRST, SECOND, bits, edit_index, edit_shard, failure


class TestWrongTensors:
    def test_everything_wrong_is_told_at_once(self, folder):
        def spoil(tensors):
            del tensors["model.layers.0.mlp.down_proj.weight"]
            tensors["model.layers.0.self_attn.q_proj.weight"] = np.zeros((2, 2), np.float32)
            tensors["model.layers.0.self_attn.qkv_proj.weight"] = np.zeros((64, 31), np.float32)
            tensors["model.layers.0.input_layernorm.weight"] = np.zeros(32, np.int64)

        edit_shard(folder / FIRST, spoil)
        edit_shard(folder / SECOND, lambda t: t.update({"model.embed_tokens.weight": np.zeros((48, 32), np.float32)}))
        message = failure(folder)
        assert "1 missing tensors (model.layers.0.mlp.down_proj.weight)" in message
        assert "1 unknown tensors (model.layers.0.self_attn.q_proj.weight)" in message
        assert "model.layers.0.self_attn.qkv_proj.weight is [64, 31], expected [64, 32]" in message
        assert "model.layers.0.input_layernorm.weight is I64" in message
        assert "1 tensors in two files (model.embed_tokens.weight)" in message

    def test_long_lists_are_cut(self, folder):
        edit_shard(folder / SECOND, lambda t: t.update({f"extra.{i}": np.zeros(1, np.float32) for i in range(50)}))
        message = failure(folder)
        assert "50 unknown tensors (extra.0, extra.1" in message
        assert "extra.9" not in message

    def test_names_with_control_characters_stay_on_one_line(self, folder):
        edit_shard(folder / SECOND, lambda t: t.update({"evil\nname": np.zeros(1, np.float32)}))
        assert r"evil\nname" in failure(folder)

    def test_a_config_with_fewer_layers(self, folder):
        (folder / "config.json").write_text(json.dumps(RAW | {"num_hidden_layers": 2}))
        assert "6 unknown tensors (model.layers.2." in failure(folder)

    def test_missing_head_asks_about_tying(self, folder):
        edit_shard(folder / SECOND, lambda t: t.pop("lm_head.weight"))
        edit_index(folder, lambda m: m.pop("lm_head.weight"))
        assert "tie_word_embeddings" in failure(folder)

    def test_rotary_tables_of_old_checkpoints_are_left_out(self, folder):
        before = bits(Checkpoint.open(folder).load_model(dtype=jnp.float32))
        name = "model.layers.1.self_attn.rotary_emb.inv_freq"
        edit_shard(folder / SECOND, lambda t: t.update({name: np.zeros(4, np.float32)}))
        edit_index(folder, lambda m: m.update({name: SECOND}))
        assert bits(Checkpoint.open(folder).load_model(dtype=jnp.float32)) == before

    def test_tied_head_may_be_there_if_it_is_equal(self, folder):
        (folder / "config.json").write_text(json.dumps(RAW | {"tie_word_embeddings": True}))
        assert "lm_head.weight differs" in failure(folder)
        with safe_open(folder / FIRST, "np") as opened:
            embedding = opened.get_tensor("model.embed_tokens.weight")
        edit_shard(folder / SECOND, lambda t: t.update({"lm_head.weight": embedding}))
        assert Checkpoint.open(folder).load_model(dtype=jnp.bfloat16).lm_head is None


class TestWrongFiles:
    def test_missing_shard(self, folder):
        (folder / SECOND).unlink()
        message = failure(folder)
        assert f"1 missing shards ({SECOND})" in message
        assert "missing tensors" not in message  # they are where the shard is

    @pytest.mark.parametrize("keep", [0, 5, 8, 100, -1])
    def test_shard_cut_off(self, folder, keep):
        data = (folder / SECOND).read_bytes()
        (folder / SECOND).write_bytes(data[:keep])
        message = failure(folder)
        assert SECOND in message
        assert "missing tensors" not in message

    def test_shard_with_bytes_left_over(self, folder):
        with (folder / SECOND).open("ab") as file:
            file.write(b"x")
        assert "is too long" in failure(folder)

    def test_two_broken_files_are_both_told(self, folder):
        (folder / FIRST).write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
        (folder / SECOND).write_bytes(b"")
        message = failure(folder)
        assert FIRST in message
        assert SECOND in message

    @pytest.mark.parametrize(
        "name", ["../outside.safetensors", "/etc/passwd", "sub/x.safetensors", "pytorch_model.bin", ""]
    )
    def test_index_that_leads_elsewhere(self, folder, name):
        outside = folder.parent / "outside.safetensors"
        (folder / FIRST).rename(outside)
        (folder / "pytorch_model.bin").write_bytes(b"not to be opened")
        edit_index(folder, lambda m: m.update({key: name for key, file in m.items() if file == FIRST}))
        message = failure(folder)
        assert "1 file names in the index" in message
        assert "missing tensors" not in message

    def test_index_that_places_a_tensor_elsewhere(self, folder):
        edit_index(folder, lambda m: m.update({"model.norm.weight": FIRST}))
        assert "1 tensors that the index places elsewhere or not at all (model.norm.weight)" in failure(folder)

    def test_index_that_names_what_no_file_holds(self, folder):
        rotary = "model.layers.1.self_attn.rotary_emb.inv_freq"
        edit_index(folder, lambda m: m.update({rotary: SECOND, "model.layers.7.mlp.down_proj.weight": SECOND}))
        assert "1 tensors that the index names and no file holds (model.layers.7.mlp.down_proj." in failure(folder)

    @pytest.mark.parametrize(
        "text", ["", "[]", '{"weight_map": 3}', '{"weight_map": {"a": 1}}', '{"a": 1, "a": 2}', "[" * 10**5]
    )
    def test_broken_index(self, folder, text):
        (folder / "model.safetensors.index.json").write_text(text)
        assert "model.safetensors.index.json: " in failure(folder)

    def test_no_weights(self, folder):
        for file in folder.glob("model*"):
            file.unlink()
        assert "no weights in it" in failure(folder)

    @pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "pytorch_model-00001-of-00002.bin"])
    def test_pickles_are_refused_unopened(self, folder, name):
        for file in folder.glob("model*"):
            file.unlink()
        (folder / name).symlink_to(folder / "nowhere")  # could not be opened
        message = failure(folder)
        assert name in message
        assert "safetensors" in message

    def test_another_model_type(self, folder):
        (folder / "config.json").write_text(json.dumps(RAW | {"model_type": "llama"}))
        assert "'llama'" in failure(folder)

    def test_quantized_weights(self, folder):
        (folder / "config.json").write_text(json.dumps(RAW | {"quantization_config": {"quant_method": "awq"}}))
        assert "'awq'" in failure(folder)

    def test_adapter_folder(self, folder):
        (folder / "config.json").rename(folder / "adapter_config.json")
        assert "base model" in failure(folder)

    def test_dtype(self, folder):
        for dtype in ("int8", "float", "nonsense", jnp.float64):
            with pytest.raises(InputError, match="expected float32, bfloat16 or float16"):
                Checkpoint.open(folder).load_model(dtype=dtype)
