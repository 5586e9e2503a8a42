"""What loading takes of memory."""

import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import save_file

from phi3_jax import InputError
from phi3_jax.hf import finite, safetensors_io
from phi3_jax.hf.checkpoint import Checkpoint
from tests.helpers.checkpoints import RAW
from tests.helpers.shards import FIRST, SECOND, bits, cut, edit_shard


class TestMemory:
    def test_the_device_takes_over_the_memory_that_was_read_into(self, folder, monkeypatch):
        if jax.default_backend() != "cpu":
            pytest.skip("accelerators have memory of their own")
        addresses = set()

        def recording(entry, out, index, look):
            addresses.add(out.ctypes.data)
            safetensors_io.read_tensor(entry, out, index, look)

        monkeypatch.setattr(finite, "read_tensor", recording)
        model = Checkpoint.open(folder).load_model(dtype=jnp.bfloat16)
        for leaf in jax.tree.leaves(model):
            assert leaf.unsafe_buffer_pointer() in addresses

    @pytest.mark.slow
    @pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is measured with Linux's /proc")
    def test_peak_memory(self, tmp_path):
        """Loading takes 1.15 times the converted parameters at most, from any dtype; saving little."""
        result = subprocess.run(
            [sys.executable, "-c", MEMORY_SCRIPT, str(tmp_path)], capture_output=True, text=True, check=False
        )
        assert result.returncode == 0, result.stderr
        grown = json.loads(result.stdout.splitlines()[-1])
        print(grown)
        assert grown["same dtype"] <= 1.15
        assert grown["converted"] <= 1.15
        assert grown["saved"] <= 0.3  # one layer's tensor at a time; a copy of the model would be 1


# Peak memory from /proc: getrusage's figure would start at that of the process that runs the tests.
MEMORY_SCRIPT = """
import gc, json, re, sys
from pathlib import Path
import jax, jax.numpy as jnp, numpy as np
from phi3_jax import Phi3Config, Phi3ForCausalLM
from phi3_jax.hf.checkpoint import Checkpoint
from phi3_jax.hf.save import save_model
from phi3_jax.hf.layout import checkpoint_layout
from phi3_jax.hf.safetensors_io import TensorSource, write_safetensors

def memory(kind):
    return 1024 * int(re.search(kind + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

def write(folder, dtype, **sizes):
    folder.mkdir()
    raw = dict(model_type="phi3", vocab_size=8000, hidden_size=1024, intermediate_size=2048,
               num_attention_heads=8, num_key_value_heads=8, num_hidden_layers=20, pad_token_id=0) | sizes
    (folder / "config.json").write_text(json.dumps(raw))
    layout = checkpoint_layout(Phi3Config.from_dict(raw))
    write_safetensors(folder / "model.safetensors", [
        TensorSource(s.name, np.dtype(dtype), s.shape, lambda s=s: np.ones(s.shape, dtype)) for s in layout])

def peak(start):
    return memory("VmHWM") - start

root = Path(sys.argv[1])
write(root / "tiny", jnp.bfloat16, vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=2)
write(root / "same", jnp.bfloat16)
write(root / "wide", jnp.float32)
tiny = Checkpoint.open(root / "tiny").load_model(dtype=jnp.bfloat16)
save_model(tiny, root / "tiny_saved")  # libraries are loaded now
grown = {}
for name, source in [("same dtype", "same"), ("converted", "wide")]:
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again at what is in use
    start = memory("VmRSS")
    model = Checkpoint.open(root / source).load_model(dtype=jnp.bfloat16)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(model))
    grown[name] = peak(start) / size
    if name == "same dtype":
        del model
        gc.collect()
Path("/proc/self/clear_refs").write_text("5")
start = memory("VmRSS")
save_model(model, root / "saved")
grown["saved"] = peak(start) / size
print(json.dumps(grown))
"""


class TestParts:
    SHAPES = ((5,), (4, 6), (3, 4, 5))

    @settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(data=st.data(), target=st.sampled_from([np.float32, ml_dtypes.bfloat16]))
    def test_a_part_is_read_and_nothing_else(self, tmp_path_factory, monkeypatch, data, target):
        path = tmp_path_factory.mktemp("parts") / "x.safetensors"
        random = np.random.default_rng(0)
        tensors = {str(len(shape)): random.normal(size=shape).astype(np.float32) for shape in self.SHAPES}
        save_file(tensors, path)
        name = data.draw(st.sampled_from(sorted(tensors)))
        tensor, entry = tensors[name], safetensors_io.read_header(path)[name]
        index = tuple(data.draw(cut(size)) for size in tensor.shape)
        expected = np.ascontiguousarray(tensor[index].astype(target))
        out, counts, read = np.empty_like(expected), [], safetensors_io._read_exactly
        with monkeypatch.context() as patch:
            patch.setattr(safetensors_io, "CHUNK", 3)
            patch.setattr(
                safetensors_io, "_read_exactly", lambda file, out: (counts.append(out.nbytes), read(file, out))
            )
            safetensors_io.read_tensor(entry, out, index)
        assert out.tobytes() == expected.tobytes()
        assert sum(counts) == tensor[index].nbytes
        assert safetensors_io.equals(entry, expected, index)
        if expected.size:
            expected.reshape(-1)[-1] += 1
            assert not safetensors_io.equals(entry, expected, index)

    def test_whole_rows_are_read_in_one_go(self, tmp_path, monkeypatch):
        save_file({"a": np.zeros((8, 4), np.float32)}, tmp_path / "x.safetensors")
        entry = safetensors_io.read_header(tmp_path / "x.safetensors")["a"]
        counts, read = [], safetensors_io._read_exactly
        monkeypatch.setattr(
            safetensors_io, "_read_exactly", lambda file, out: (counts.append(out.nbytes), read(file, out))
        )
        safetensors_io.read_tensor(entry, np.empty((3, 4), np.float32), np.s_[2:5, :])
        assert counts == [48]

    def test_a_repeated_head_is_compared_share_by_share(self, folder):
        """Loading onto many devices itself is tested with the processes, in tests/parallel."""
        (folder / "config.json").write_text(json.dumps(RAW | {"tie_word_embeddings": True}))
        device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        with pytest.raises(InputError, match=r"lm_head\.weight differs"):
            Checkpoint.open(folder).load_model(dtype=jnp.bfloat16, shardings=lambda path, shape: device)
        with safe_open(folder / FIRST, "np") as opened:
            embedding = opened.get_tensor("model.embed_tokens.weight")
        edit_shard(folder / SECOND, lambda t: t.update({"lm_head.weight": embedding}))
        loaded = Checkpoint.open(folder).load_model(dtype=jnp.bfloat16, shardings=lambda path, shape: device)
        assert bits(loaded) == bits(Checkpoint.open(folder).load_model(dtype=jnp.bfloat16))
