"""Checkpoints: bits kept both ways, memory, and everything that can be wrong with the files."""

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import save_file

from phi3_jax import InputError, Phi3Config, Phi3ForCausalLM
from phi3_jax.hf import load, safetensors_io, save
from phi3_jax.hf.checkpoint import Checkpoint
from phi3_jax.hf.layout import checkpoint_layout
from phi3_jax.hf.save import save_model
from phi3_jax.system.files import StorageError
from tests.helpers.checkpoints import KINDS, RAW, model_of


def bits(model: Phi3ForCausalLM) -> dict[str, bytes]:
    return {
        "/".join(map(str, path)): np.asarray(leaf[...]).tobytes() for path, leaf in nnx.to_flat_state(nnx.state(model))
    }


def tensors_of(config: Phi3Config, dtype=np.float32) -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    return {entry.name: random.normal(size=entry.shape).astype(dtype) for entry in checkpoint_layout(config)}


@pytest.fixture
def folder(tmp_path) -> Path:
    """A checkpoint in two shards, written without this package: config.json, index, shards."""
    tensors = tensors_of(Phi3Config.from_dict(RAW))
    names = list(tensors)
    parts = {"model-00001-of-00002.safetensors": names[:9], "model-00002-of-00002.safetensors": names[9:]}
    for file, part in parts.items():
        save_file({name: tensors[name] for name in part}, tmp_path / file)
    index = {"metadata": {}, "weight_map": {name: file for file, part in parts.items() for name in part}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / "config.json").write_text(json.dumps(RAW))
    return tmp_path


def edit_index(folder: Path, change) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index["weight_map"])
    path.write_text(json.dumps(index))


def edit_shard(file: Path, change) -> None:
    with safe_open(file, "np") as opened:
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    change(tensors)
    save_file(tensors, file)


def failure(folder: Path) -> str:
    with pytest.raises(InputError) as caught:
        Checkpoint.open(folder).load_model(dtype=jnp.float32)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 4000
    return message


FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


class TestNames:
    @pytest.mark.parametrize(
        ("config", "shapes"),
        [("phi-3-mini-4k-instruct", "Phi3Mini4K"), ("phi-3-medium-128k-instruct", "Phi3Medium4K")],
    )
    def test_names_and_shapes_of_the_released_models(self, testdata, config, shapes):
        text = (testdata / "shapes" / f"{shapes}ShapeTest.approved.txt").read_text()
        rows = re.findall(r"^\d+: (\S+) shape: \[([\d, ]+)\]$", text, re.MULTILINE)
        expected = {name: tuple(map(int, shape.split(", "))) for name, shape in rows}
        layout = checkpoint_layout(Phi3Config.from_pretrained(testdata / "models" / config))
        assert {entry.name: entry.shape for entry in layout} == expected
        assert len(layout) == len(expected)

    def test_names_and_shapes_of_phi_4_mini(self, testdata):
        skeleton = json.loads((testdata / "shapes" / "phi-4-mini.weights_skeleton.json").read_text())
        raw = json.loads((testdata / "models" / "phi-4-mini-instruct" / "config.json").read_text())
        layout = checkpoint_layout(Phi3Config.from_dict(raw | {"num_hidden_layers": 1}))
        assert {entry.name: list(entry.shape) for entry in layout} == skeleton["tensors"]

    @pytest.mark.parametrize("name", ["phi-3-mini-4k-instruct", "phi-3.5-mini-instruct"])
    def test_names_and_bytes_of_the_released_index(self, testdata, name):
        released = testdata / "models" / name
        index = json.loads((released / "model.safetensors.index.json").read_text())
        layout = checkpoint_layout(Phi3Config.from_pretrained(released))
        assert {entry.name for entry in layout} == set(index["weight_map"])
        assert 2 * sum(int(np.prod(entry.shape)) for entry in layout) == index["metadata"]["total_size"]


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


def cut(size: int):
    return st.tuples(st.integers(0, size), st.integers(0, size)).map(lambda ends: slice(*sorted(ends)))


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


class TestMemory:
    def test_the_device_takes_over_the_memory_that_was_read_into(self, folder, monkeypatch):
        if jax.default_backend() != "cpu":
            pytest.skip("accelerators have memory of their own")
        addresses = set()

        def recording(entry, out, index):
            addresses.add(out.ctypes.data)
            safetensors_io.read_tensor(entry, out, index)

        monkeypatch.setattr(load, "read_tensor", recording)
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
        TensorSource(s.name, np.dtype(dtype), s.shape, lambda s=s: np.ones(s.shape, dtype)) for s in slots])

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


class TestHeader:
    @pytest.fixture
    def file(self, tmp_path) -> Path:
        path = tmp_path / "x.safetensors"
        save_file({"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.zeros(4, np.float16)}, path)
        return path

    def test_empty_tensors_and_scalars(self, tmp_path):
        path = tmp_path / "x.safetensors"
        save_file({"none": np.zeros((0, 3), np.float32), "one": np.array(3, np.float32), "zero": np.zeros(0)}, path)
        header = safetensors_io.read_header(path)
        assert {name: entry.shape for name, entry in header.items()} == {"none": (0, 3), "one": (), "zero": (0,)}
        out = np.empty((), np.float32)
        safetensors_io.read_tensor(header["one"], out)
        assert out == 3

    @pytest.mark.parametrize(
        ("old", "new", "message"),
        [
            (b'"shape":[2,3]', b'"shape":[3,3]', "its shape needs 36"),
            (b'"shape":[2,3]', b'"shape":[-2,-3]', "no proper shape"),
            (b'"shape":[2,3]', b'"shape":[2,true]', "no proper shape"),
            (b'"data_offsets":[0,24]', b'"data_offsets":[1,25]', "overlap|leaves a hole"),
            (b'"data_offsets":[24,32]', b'"data_offsets":[16,24]', "overlap"),
            (b'"data_offsets":[24,32]', b'"data_offsets":[28,36]', "hole"),
            (b'"data_offsets":[24,32]', b'"data_offsets":[32,24]', "its shape needs"),
            (b'"b"', b'"a"', "stands twice"),
            (b'"F16"', b'"F99"', "unknown dtype"),
            (b'"dtype":"F16",', b"", "lacks dtype"),
        ],
    )
    def test_broken_headers(self, file, old, new, message):
        data = file.read_bytes()
        length = int.from_bytes(data[:8], "little")
        header = data[8 : 8 + length]
        assert old in header
        header = header.replace(old, new)
        file.write_bytes(len(header).to_bytes(8, "little") + header + data[8 + length :])
        with pytest.raises(InputError, match=message):
            safetensors_io.read_header(file)

    @settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(position=st.integers(0, 10**6), value=st.integers(0, 255), cut=st.integers(0, 200))
    def test_damage_is_an_input_error_or_harmless(self, file, position, value, cut):
        data = bytearray(file.read_bytes())
        original = bytes(data)
        data[position % len(data)] = value
        file.write_bytes(data[: len(data) - cut])
        try:
            for entry in safetensors_io.read_header(file).values():
                assert entry.start + int(np.prod(entry.shape)) <= len(data)
        except InputError as error:
            assert "\n" not in str(error)  # noqa: PT017
        finally:
            file.write_bytes(original)

    def test_file_that_shrinks_while_it_is_read(self, file):
        entry = safetensors_io.read_header(file)["a"]
        file.write_bytes(b"")
        with pytest.raises(InputError, match="became shorter"):
            safetensors_io.read_tensor(entry, np.empty((2, 3), np.float32))


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
