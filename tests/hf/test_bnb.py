"""Checkpoints that bitsandbytes quantised: there and back, and everything that can be wrong with them.

(Against transformers and bitsandbytes themselves: tests/parity/test_quant_parity.py)
"""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors import safe_open
from safetensors.numpy import save_file

from phi3_jax import InputError, Phi3ForCausalLM
from phi3_jax.hf.checkpoint import Checkpoint
from phi3_jax.hf.info import checkpoint_info, print_info
from phi3_jax.hf.save import save_model
from phi3_jax.quant import Int8Weight, NF4Weight, quantize_model
from tests.helpers.models import quantizable_model

NAME = "model.layers.1.mlp.down_proj"
PACKED = ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")
STATE = f"{NAME}.weight.quant_state.bitsandbytes__nf4"


def leaves(model: Phi3ForCausalLM):
    return jax.tree_util.tree_leaves_with_path(nnx.state(model))


@pytest.fixture(params=["nf4", "int8"])
def kind(request):
    return request.param


@pytest.fixture
def folder(tmp_path, kind):
    save_model(quantize_model(quantizable_model(num_hidden_layers=2), kind), tmp_path)
    return tmp_path


def edit(folder, change) -> None:
    file = folder / "model.safetensors"
    with safe_open(file, "np") as opened:
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    change(tensors)
    save_file(tensors, file)


def edit_config(folder, **changes) -> None:
    raw = json.loads((folder / "config.json").read_text())
    raw["quantization_config"] |= changes
    (folder / "config.json").write_text(json.dumps(raw))


def failure(folder, **arguments) -> str:
    with pytest.raises(InputError) as caught:
        Checkpoint.open(folder).load_model(dtype=jnp.float32, **arguments)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 2000
    return message


class TestThereAndBack:
    @pytest.mark.parametrize("double_quant", [True, False])
    @pytest.mark.parametrize("shard", [5 * 10**9, 20_000])
    def test_every_bit(self, tmp_path, kind, double_quant, shard):
        model = quantize_model(quantizable_model(jnp.bfloat16), kind, double_quant=double_quant)
        save_model(model, tmp_path, max_shard_size=shard)
        loaded = Checkpoint.open(tmp_path).load_model(dtype=jnp.bfloat16)
        assert jax.tree.structure(nnx.state(loaded)) == jax.tree.structure(nnx.state(model))
        for (path, before), (_, after) in zip(leaves(model), leaves(loaded), strict=True):
            assert np.asarray(before).tobytes() == np.asarray(after).tobytes(), path

    @pytest.mark.parametrize("kind", ["nf4"])
    def test_files_do_not_depend_on_how_a_tpu_holds_codes(self, kind, tmp_path, monkeypatch):
        folder, plain = tmp_path / "plain", quantizable_model(num_hidden_layers=2, intermediate_size=128)
        save_model(quantize_model(plain, kind), folder)
        monkeypatch.setattr("phi3_jax.hf.load.platform_of", lambda *_: "tpu")
        model = Checkpoint.open(folder).load_model(dtype=jnp.float32)
        held = [value for _, value in nnx.to_flat_state(nnx.state(model)) if isinstance(value.get_value(), NF4Weight)]
        assert any(value.get_value().by_halves for value in held)
        save_model(model, tmp_path / "again")
        name = "model.safetensors"
        assert (tmp_path / "again" / name).read_bytes() == (folder / name).read_bytes()

    def test_what_is_asked_for_may_be_what_is_there(self, folder, kind):
        model = Checkpoint.open(folder).load_model(dtype=jnp.float32, quantization=kind)
        weight = model.model.layers.mlp.down_proj.weight.get_value()
        assert isinstance(weight, NF4Weight if kind == "nf4" else Int8Weight)

    def test_a_dense_model_saved_over_it_has_no_quantization_config(self, folder):
        save_model(quantizable_model(), folder)
        assert "quantization_config" not in json.loads((folder / "config.json").read_text())

    def test_info(self, folder, kind, capsys):
        info = checkpoint_info(folder)
        assert info["quantization"] == {"nf4": "nf4 with double quantisation", "int8": "int8"}[kind]
        assert info["parameters"] == checkpoint_info_of_dense(folder.parent / "dense")
        assert info["weights"]["dtypes"][{"nf4": "uint8", "int8": "int8"}[kind]] >= 8
        print_info(info)
        assert f"quantization: {info['quantization']}" in capsys.readouterr().out

    @pytest.mark.parametrize("kind", ["nf4"])
    @pytest.mark.parametrize("storage", ["bfloat16", "float16", "float32"])
    def test_bytes_that_pass_for_another_type(self, folder, storage):
        before = Checkpoint.open(folder).load_model(dtype=jnp.float32)
        kind = np.dtype(jnp.dtype(storage))
        packed = [f"model.layers.{i}.{name}.weight" for i in range(2) for name in PACKED]

        def change(tensors):
            tensors |= {name: tensors[name].reshape(-1).view(kind)[:, None] for name in packed}

        edit(folder, change)
        edit_config(folder, bnb_4bit_quant_storage=storage)
        after = Checkpoint.open(folder).load_model(dtype=jnp.float32)
        for (path, one), (_, other) in zip(leaves(before), leaves(after), strict=True):
            assert np.asarray(one).tobytes() == np.asarray(other).tobytes(), path

    def test_modules_that_are_skipped_in_some_layers_only(self, folder, kind, caplog):
        """As Unsloth's dynamic quants are: such weights are dense in all layers, with the same numbers."""
        quantized = Checkpoint.open(folder).load_model(dtype=jnp.float32)
        dense = jax.tree.map(lambda leaf: leaf[1], quantized.model.layers.mlp.down_proj.weight.get_value())
        weight = np.asarray(dense.dequantize(jnp.float32))
        gone = [".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map", STATE.removeprefix(f"{NAME}.weight")]

        def change(tensors):
            for name in [f"{NAME}.weight{end}" for end in gone] + [f"{NAME}.SCB", f"{NAME}.weight_format"]:
                tensors.pop(name, None)
            tensors[f"{NAME}.weight"] = weight

        edit(folder, change)
        edit_config(folder, llm_int8_skip_modules=["lm_head", "merger", NAME])
        mixed = Checkpoint.open(folder).load_model(dtype=jnp.float32)
        assert "1 weights are quantised whose kin in other layers are not" in caplog.text
        held = mixed.model.layers.mlp.down_proj.weight.get_value()
        assert isinstance(held, jax.Array)
        np.testing.assert_array_equal(held[1], weight)
        ids = jnp.arange(1, 9)[None]
        np.testing.assert_array_equal(mixed(ids), quantized(ids))


def checkpoint_info_of_dense(folder) -> int:
    save_model(quantizable_model(num_hidden_layers=2), folder)
    return checkpoint_info(folder)["parameters"]


class TestContradictions:
    def test_another_kind(self, folder, kind):
        other = {"nf4": "int8", "int8": "nf4"}[kind]
        assert f"cannot be quantised to {other}" in failure(folder, quantization=other)

    @pytest.mark.parametrize("kind", ["nf4"])
    def test_without_double_quantisation(self, folder):
        assert "without double quantisation" in failure(folder, quantization="nf4", double_quant=False)

    def test_a_quantizer(self, folder):
        assert "is quantised already" in failure(folder, quantizer=lambda name, weight: None)

    def test_unknown_kind(self, folder):
        assert "'fp8', expected one of nf4, int8" in failure(folder, quantization="fp8")


CONFIGS = {
    "method": ({"quant_method": "gptq"}, "quantised by 'gptq', expected 'bitsandbytes'"),
    "both": ({"load_in_4bit": True, "load_in_8bit": True}, "expected one of the two"),
    "neither": ({"load_in_4bit": False, "load_in_8bit": False}, "expected one of the two"),
    "type": ({"load_in_4bit": True, "load_in_8bit": False, "bnb_4bit_quant_type": "af4"}, "'af4'"),
    "storage": ({"bnb_4bit_quant_storage": "float8"}, "bnb_4bit_quant_storage is 'float8', expected one of uint8"),
    "another storage": ({"bnb_4bit_quant_storage": "bfloat16"}, "wrong dtypes"),
    "fp16 weights": ({"llm_int8_has_fp16_weight": True}, "llm_int8_has_fp16_weight"),
    "head": ({"llm_int8_skip_modules": ["o_proj"]}, "lm_head is quantised"),
    "pattern": ({"llm_int8_skip_modules": [".*proj"]}, "plain module names"),
    "some layers": ({"llm_int8_skip_modules": ["lm_head", "model.layers.1.mlp"]}, "layers.1.mlp.down_proj.weight"),
    # The files then have other tensors than the section says.
    "no statistics": ({"bnb_4bit_use_double_quant": False}, "wrong dtypes"),
    "skipped": ({"llm_int8_skip_modules": ["lm_head", "o_proj"]}, "self_attn.o_proj.weight"),
}


@pytest.mark.parametrize("kind", ["nf4"])
@pytest.mark.parametrize("case", CONFIGS)
def test_quantization_config(folder, case):
    changes, message = CONFIGS[case]
    edit_config(folder, **changes)
    assert message in failure(folder)


def state_of(tensors) -> dict:
    return json.loads(tensors[STATE].tobytes())


def set_state(**changes):
    def change(tensors):
        tensors[STATE] = np.frombuffer(json.dumps(state_of(tensors) | changes).encode(), np.uint8)

    return change


def set_tensor(suffix, function):
    def change(tensors):
        name = f"{NAME}.{suffix}"
        tensors[name] = function(tensors[name].copy())

    return change


def first_to(value):
    def function(array):
        array.reshape(-1)[0] = value
        return array

    return function


NF4_FILES = {
    "no statistics": (lambda t: t.pop(f"{NAME}.weight.absmax"), "1 missing tensors"),
    "no nested statistics": (lambda t: t.pop(f"{NAME}.weight.nested_absmax"), "1 missing tensors"),
    "no state": (lambda t: t.pop(STATE), "1 missing tensors"),
    "shape": (set_tensor("weight", lambda a: a[:-1]), "expected [3072, 1]"),
    "dtype": (set_tensor("weight", lambda a: a.view(np.int8)), "is I8, not U8"),
    "table": (set_tensor("weight.quant_map", first_to(-0.9)), "quant_map is no table of bitsandbytes"),
    "nested table": (set_tensor("weight.nested_quant_map", first_to(0.5)), "is no table of bitsandbytes"),
    "not finite": (set_tensor("weight.nested_absmax", first_to(np.nan)), "NaN or infinity"),
    "block size": (set_state(blocksize=128), '"blocksize": 128'),
    "nested block size": (set_state(nested_blocksize=64), '"nested_blocksize": 64'),
    "shape in the state": (set_state(shape=[96, 64]), '"shape": [96, 64]'),
    "type in the state": (set_state(quant_type="fp4"), '"quant_type": "fp4"'),
    "dtype in the state": (set_state(dtype="float64"), '"dtype": "float64"'),
    "dtype of one layer": (set_state(dtype="bfloat16"), "from another type"),
    "no offset": (set_state(nested_offset=None), "is no proper quant_state"),
    "offset": (set_state(nested_offset=float("inf")), "Infinity is no JSON number"),
    "no JSON": (lambda t: t.update({STATE: np.zeros(9, np.uint8)}), "is no proper quant_state"),
    "another object": (lambda t: t.update({STATE: np.frombuffer(b"[1]", np.uint8)}), "is no proper quant_state"),
}
INT8_FILES = {
    "no statistics": (lambda t: t.pop(f"{NAME}.SCB"), "1 missing tensors"),
    "shape": (set_tensor("SCB", lambda a: a[:-1]), "expected [64]"),
    "dtype": (set_tensor("weight", lambda a: a.view(np.uint8)), "is U8, not I8"),
    "format": (set_tensor("weight_format", first_to(2)), "weight_format is 2, expected 0"),
    "not finite": (set_tensor("SCB", first_to(np.inf)), "NaN or infinity"),
}


@pytest.mark.parametrize("kind", ["nf4"])
@pytest.mark.parametrize("case", NF4_FILES)
def test_nf4_files(folder, case):
    change, message = NF4_FILES[case]
    edit(folder, change)
    found = failure(folder)
    assert message in found
    assert "down_proj" in found


@pytest.mark.parametrize("kind", ["int8"])
@pytest.mark.parametrize("case", INT8_FILES)
def test_int8_files(folder, case):
    change, message = INT8_FILES[case]
    edit(folder, change)
    found = failure(folder)
    assert message in found
    assert "down_proj" in found


@pytest.mark.parametrize("kind", ["int8"])
def test_int8_files_of_old_have_no_format(folder):
    edit(folder, lambda tensors: [tensors.pop(name) for name in list(tensors) if name.endswith("weight_format")])
    Checkpoint.open(folder).load_model(dtype=jnp.float32)


@pytest.mark.parametrize("kind", ["nf4"])
def test_quantised_files_without_the_section(folder):
    raw = json.loads((folder / "config.json").read_text())
    del raw["quantization_config"]
    (folder / "config.json").write_text(json.dumps(raw))
    message = failure(folder)
    assert "unknown tensors" in message
    assert "is U8, not F32 or F16 or BF16" in message


def test_weights_of_two_kinds_are_not_saved(tmp_path):
    model = quantize_model(quantizable_model(num_hidden_layers=2), "nf4")
    other = quantize_model(quantizable_model(num_hidden_layers=2), "int8")
    model.model.layers.mlp.down_proj.weight.set_value(other.model.layers.mlp.down_proj.weight.get_value())
    with pytest.raises(InputError, match="quantised in 2 ways"):
        save_model(model, tmp_path)
