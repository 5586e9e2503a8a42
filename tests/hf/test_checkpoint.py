"""Checkpoints: bits kept both ways, memory, and everything that can be wrong with the files."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from safetensors import safe_open
from safetensors.numpy import save_file

from phi3_jax import Phi3Config
from phi3_jax.hf import safetensors_io
from phi3_jax.hf.checkpoint import Checkpoint
from phi3_jax.hf.layout import checkpoint_layout
from phi3_jax.hf.save import save_model
from tests.helpers.checkpoints import KINDS, RAW, model_of
from tests.helpers.shards import bits, tensors_of


class TestRoundTrip:
    @pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("max_shard_size", [5 * 10**9, 10_000])
    def test_bits_are_kept(self, tmp_path, kind, dtype, max_shard_size):
        model = model_of(KINDS[kind], dtype=dtype)
        save_model(model, tmp_path / "saved", max_shard_size=max_shard_size)
        loaded = Checkpoint.open(tmp_path / "saved").load_model(dtype=dtype)
        assert bits(loaded) == bits(model)
        assert loaded.config == model.config
        assert loaded.dtype == dtype

    def test_real_checkpoint_bits_are_kept(self, testdata, tmp_path):
        source = testdata / "checkpoints" / "stories260K"
        save_model(Checkpoint.open(source).load_model(dtype=jnp.float32), tmp_path / "saved")
        with (
            safe_open(source / "model.safetensors", "np") as old,
            safe_open(tmp_path / "saved/model.safetensors", "np") as new,
        ):
            assert set(old.keys()) == set(new.keys())
            for name in old.keys():  # noqa: SIM118
                assert old.get_tensor(name).tobytes() == new.get_tensor(name).tobytes(), name

    def test_shards_and_index_are_those_of_transformers(self, tmp_path):
        model = model_of()
        save_model(model, tmp_path, max_shard_size=10_000)
        index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
        shards = sorted(file.name for file in tmp_path.glob("*.safetensors"))
        assert len(shards) > 2
        assert shards == [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
        total = 0
        for shard in shards:
            with safe_open(tmp_path / shard, "np") as opened:  # the safetensors library's own strict reader
                assert opened.metadata() == {"format": "pt"}
                tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
            assert set(tensors) == {name for name, file in index["weight_map"].items() if file == shard}
            size = sum(tensor.nbytes for tensor in tensors.values())
            assert size <= 10_000 or len(tensors) == 1
            total += size
        assert index["metadata"]["total_size"] == total == 4 * sum(leaf.size for leaf in jax.tree.leaves(model))

    def test_config_says_the_dtype_and_names_no_code(self, tmp_path):
        remote = {"auto_map": {"AutoConfig": "configuration_phi3.Phi3Config"}, "dtype": "float32", "custom_key": 7}
        save_model(model_of(remote, dtype=jnp.bfloat16), tmp_path)
        raw = json.loads((tmp_path / "config.json").read_text())
        assert raw["torch_dtype"] == "bfloat16"
        assert raw["custom_key"] == 7
        assert "auto_map" not in raw
        assert "dtype" not in raw

    def test_generation_config_goes_along(self, testdata, tmp_path):
        source = testdata / "models" / "phi-3-mini-4k-instruct"
        config = Phi3Config.from_dict(RAW)
        model = model_of()
        model.config = dataclasses.replace(config, generation=Phi3Config.from_pretrained(source).generation)
        save_model(model, tmp_path)
        released = json.loads((source / "generation_config.json").read_text())
        assert len(released["eos_token_id"]) == 3  # config.json names only one of them
        assert json.loads((tmp_path / "generation_config.json").read_text()) == released
        assert Checkpoint.open(tmp_path).load_model(dtype=jnp.float32).config.generation == model.config.generation
        save_model(model_of(), tmp_path)
        assert not (tmp_path / "generation_config.json").exists()

    @pytest.mark.parametrize("source", [np.float32, np.float16, ml_dtypes.bfloat16])
    @pytest.mark.parametrize("target", [jnp.float32, jnp.float16, jnp.bfloat16])
    def test_conversion_rounds_as_numpy(self, tmp_path, monkeypatch, source, target):
        monkeypatch.setattr(safetensors_io, "CHUNK", 100)  # so that chunks end inside rows
        tensors = tensors_of(Phi3Config.from_dict(RAW), source)
        save_file(tensors, tmp_path / "model.safetensors")
        (tmp_path / "config.json").write_text(json.dumps(RAW))
        model = Checkpoint.open(tmp_path).load_model(dtype=target)
        for entry in checkpoint_layout(model.config):
            value = dict(nnx.to_flat_state(nnx.state(model)))[entry.path][...]
            value = value if entry.layer is None else value[entry.layer]
            assert np.asarray(value).tobytes() == tensors[entry.name].astype(target).tobytes(), entry.name
