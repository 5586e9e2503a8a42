"""Where a checkpoint is saved to."""

from pathlib import Path

import jax.numpy as jnp
import pytest

from phi3_jax import InputError
from phi3_jax.hf import save
from phi3_jax.hf.checkpoint import Checkpoint
from phi3_jax.hf.save import save_model
from phi3_jax.system.files import StorageError
from tests.helpers.checkpoints import model_of
from tests.helpers.shards import bits


class TestSaveTarget:
    def test_an_earlier_checkpoint_is_replaced_whole(self, tmp_path):
        save_model(model_of({"num_hidden_layers": 4}), tmp_path, max_shard_size=5_000)
        (tmp_path / "notes.txt").write_text("kept")
        model = model_of(seed=1)
        save_model(model, tmp_path)
        assert sorted(file.name for file in tmp_path.iterdir()) == ["config.json", "model.safetensors", "notes.txt"]
        assert bits(Checkpoint.open(tmp_path).load_model(dtype=jnp.float32)) == bits(model)

    def test_a_failed_save_leaves_the_earlier_checkpoint(self, tmp_path, monkeypatch):
        model = model_of()
        save_model(model, tmp_path, max_shard_size=10_000)
        before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
        write = save.write_safetensors

        def full_disk(path, tensors):
            if "00003" in path.name:
                raise OSError(28, "No space left on device")
            write(path, tensors)

        monkeypatch.setattr(save, "write_safetensors", full_disk)
        with pytest.raises(StorageError, match=r"No space left on device\): [\d,]+ bytes are needed"):
            save_model(model_of(seed=1), tmp_path, max_shard_size=10_000)
        assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before

    def test_config_appears_last(self, tmp_path, monkeypatch):
        save_model(model_of(), tmp_path)
        replace, moved = Path.replace, []

        def dying(self, target):
            assert not (tmp_path / "config.json").exists()
            if moved:
                raise KeyboardInterrupt
            moved.append(target)
            return replace(self, target)

        monkeypatch.setattr(Path, "replace", dying)
        with pytest.raises(KeyboardInterrupt):
            save_model(model_of(seed=1), tmp_path)
        with pytest.raises(InputError, match=r"config\.json"):
            Checkpoint.open(tmp_path).load_model(dtype=jnp.float32)

    def test_refused_folders(self, tmp_path):
        (tmp_path / "file").write_text("")
        adapter, other = tmp_path / "adapter", tmp_path / "other"
        for path, name, text in [
            (adapter, "adapter_config.json", "{}"),
            (other, "config.json", '{"model_type": "llama"}'),
        ]:
            path.mkdir()
            (path / name).write_text(text)
        for path in (tmp_path / "file", adapter, other):
            before = sorted(tmp_path.rglob("*"))
            with pytest.raises(InputError):
                save_model(model_of(), path)
            assert sorted(tmp_path.rglob("*")) == before
