"""Quantised weights, models and files against bitsandbytes 0.50.2 and transformers."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
bnb = pytest.importorskip("bitsandbytes")
peft = pytest.importorskip("peft")

import bitsandbytes.functional as F  # noqa: E402
from bitsandbytes.backends.default import ops  # noqa: E402
from safetensors import safe_open  # noqa: E402

from phi3_jax import LoraConfig, Phi3ForCausalLM, init_lora, save_adapter  # noqa: E402
from phi3_jax.config.run import parse_run_config  # noqa: E402
from phi3_jax.objectives.next_token import loss  # noqa: E402
from phi3_jax.quant import FP4Weight, NF4Weight, quantize_int8, quantize_model, quantize_nf4  # noqa: E402
from phi3_jax.quant.blocks import FP4_LEVELS, NF4_LEVELS, quantize_absmax  # noqa: E402
from phi3_jax.quant.dynamic import dynamic_map  # noqa: E402
from phi3_jax.quant.nf4 import from_flat  # noqa: E402
from tests.helpers.references import torch_phi3  # noqa: E402

DTYPES = [np.dtype(np.float32), np.dtype(ml_dtypes.bfloat16), np.dtype(np.float16)]
# Whole blocks in every row, blocks across rows, a block and a byte that are not full, less than a block.
SHAPES = [(96, 192), (7, 100), (5, 7), (1, 1)]


def adversarial(shape: tuple[int, ...]) -> dict[str, np.ndarray]:
    normal = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    outlier = 0.02 * normal
    outlier.flat[-1] = -3e4
    zero_row = 0.02 * normal
    zero_row[0] = 0
    middles = (NF4_LEVELS[:-1] + NF4_LEVELS[1:]) / 2
    borders = np.concatenate([NF4_LEVELS, middles, np.nextafter(middles, 2), np.nextafter(middles, -2)])
    return {
        "normal": 0.02 * normal,
        "outlier": outlier,
        "zeros": np.zeros(shape, np.float32),
        "zero row": zero_row,
        "subnormal": normal * np.float32(1e-39),
        "tiny": normal * np.float32(1e-37),
        "half tiny": normal * np.float32(1e-7),  # subnormal in float16
        "halves": np.round(2 * normal) / 2,
        "large": np.clip(normal, -1, 1) * 65504,  # float16's largest
        "extreme": np.clip(normal, -1, 1) * np.float32(3.38e38),  # infinite in float16, left out there
        "borders": np.resize(borders, shape).astype(np.float32),
    }


def weights(shape, largest: float):
    for name, weight in adversarial(shape).items():
        for dtype in DTYPES:
            with np.errstate(all="ignore"):
                x = weight.astype(dtype)
            if np.isfinite(magnitude := np.abs(x.astype(np.float32)).max()) and magnitude <= largest:
                yield f"{name} {shape} {dtype.name}", x


def to_torch(x: np.ndarray) -> torch.Tensor:
    return (
        torch.from_numpy(x.view(np.int16)).view(torch.bfloat16) if x.dtype.name == "bfloat16" else torch.from_numpy(x)
    )


def same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    return a.dtype == b.dtype and a.tobytes() == b.tobytes()


def on_device(quantized):
    return jax.tree.map(jnp.asarray, quantized)


class TestTables:
    def test_are_those_of_bitsandbytes(self):
        assert same_bits(NF4_LEVELS, F.get_4bit_type("nf4", device="cpu").numpy())
        assert same_bits(FP4_LEVELS, F.get_4bit_type("fp4", device="cpu").numpy())
        # PyTorch computes this table with the processor's own vector instructions.
        assert np.allclose(dynamic_map(signed=True), F.create_dynamic_map().numpy(), rtol=0, atol=6e-8)


class TestNF4:
    @pytest.mark.parametrize("shape", SHAPES)
    def test_codes_absmax_and_values_bit_for_bit(self, shape):
        for name, x in weights(shape, np.inf):
            packed, state = F.quantize_4bit(to_torch(x), blocksize=64, quant_type="nf4")
            ours = quantize_nf4(x, double_quant=False)
            assert same_bits(ours.codes.reshape(-1), packed.numpy().reshape(-1)), name
            assert same_bits(ours.absmax.reshape(-1), state.absmax.numpy()), name
            # The definition that bitsandbytes runs where it has no kernel. Its CPU kernel reads blocks that
            # cross rows wrongly, and the bfloat16 instruction that it uses takes subnormal numbers for zero.
            define = ops._dequantize_4bit_compute.__wrapped__
            flat = define(packed.reshape(-1), state.absmax, state.code, 64, state.shape, torch.float32)
            values = flat.reshape(shape)
            for dtype, torch_dtype in zip(DTYPES, (torch.float32, torch.bfloat16, torch.float16), strict=True):
                expected = values.to(torch_dtype).float().numpy()
                with np.errstate(over="ignore"):
                    assert np.array_equal(ours.dequantize(dtype).astype(np.float32), expected), name
                if "subnormal" not in name and "tiny" not in name:
                    assert np.array_equal(np.asarray(on_device(ours).dequantize(dtype), np.float32), expected), name

    def test_the_cpu_kernel_gives_the_same_values_where_blocks_end_with_rows(self):
        x = np.random.default_rng(1).standard_normal((64, 128)).astype(np.float32)
        packed, state = F.quantize_4bit(to_torch(x), blocksize=64, quant_type="nf4", compress_statistics=True)
        theirs = F.dequantize_4bit(packed, state).numpy()
        ours = theirs_as_ours(packed, state)
        assert np.array_equal(np.asarray(jax.jit(lambda w: w.dequantize(jnp.float32))(on_device(ours))), theirs)

    def test_nested_statistics(self):
        """Given the same statistics the absmax have the same bits; the codes are the nearest ones."""
        absmax = np.random.default_rng(2).gamma(9, 0.01, 5000).astype(np.float32)
        codes, scale, offset = quantize_absmax(absmax)
        centred = torch.from_numpy(absmax - offset)
        theirs, state = F.quantize_blockwise(centred, blocksize=256)
        assert same_bits(scale, state.absmax.numpy())
        different = codes != theirs.numpy()
        # bitsandbytes' CPU kernel now and then takes the other of two levels that are nearly as near.
        assert different.mean() < 0.01
        per_code = np.repeat(scale, 256)[: absmax.size]
        error = np.abs(dynamic_map(signed=True)[codes] * per_code - centred.numpy())
        their_error = np.abs(dynamic_map(signed=True)[theirs.numpy()] * per_code - centred.numpy())
        assert np.all(error <= their_error + 1e-7 * per_code)
        assert np.all(their_error - error <= 3e-5 * per_code)
        assert abs(offset - torch.from_numpy(absmax).mean().item()) <= 1e-7 * offset

    @pytest.mark.parametrize("shape", SHAPES[:2])
    def test_absmax_of_nested_statistics_bit_for_bit_in_a_compiled_function(self, shape):
        """A fused multiply-add would round once where bitsandbytes rounds twice."""
        x = np.random.default_rng(3).standard_normal((40 * shape[0], shape[1])).astype(np.float32)
        packed, state = F.quantize_4bit(to_torch(x), blocksize=64, quant_type="nf4", compress_statistics=True)
        expected = (F.dequantize_blockwise(state.absmax, state.state2) + state.offset).numpy()
        ours = theirs_as_ours(packed, state)
        for values in (jax.jit(lambda w: w.absmax_values(jnp))(on_device(ours)), ours.absmax_values(np)):
            assert same_bits(np.asarray(values).reshape(-1), expected)

    def test_fp4_values(self):
        x = np.random.default_rng(4).standard_normal((32, 128)).astype(np.float32)
        packed, state = F.quantize_4bit(to_torch(x), blocksize=64, quant_type="fp4")
        ours = theirs_as_ours(packed, state, FP4Weight)
        assert np.array_equal(np.asarray(on_device(ours).dequantize(jnp.float32)), F.dequantize_4bit(packed, state))


def theirs_as_ours(packed, state, kind=NF4Weight):
    nested = state.state2.absmax.numpy() if state.nested else None
    offset = state.offset.numpy() if state.nested else None
    shape = tuple(state.shape)
    return from_flat(
        kind, packed.numpy().reshape(-1), state.absmax.numpy(), nested, offset, shape=shape, dtype=np.dtype(np.float32)
    )


class TestInt8:
    @pytest.mark.parametrize("shape", SHAPES)
    def test_codes_absmax_and_values_bit_for_bit(self, shape):
        for name, x in weights(shape, 65504):
            codes, absmax, _ = F.int8_vectorwise_quant(to_torch(x).to(torch.float16))
            ours = quantize_int8(x)
            assert same_bits(ours.codes, codes.numpy()), name
            assert same_bits(ours.absmax, absmax.numpy()), name
            expected = F.int8_vectorwise_dequant(codes, absmax).numpy()
            assert np.array_equal(ours.dequantize(np.float32), expected), name
            assert np.array_equal(jax.jit(lambda w: w.dequantize(jnp.float32))(on_device(ours)), expected), name


SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_key_value_heads": 2, "num_hidden_layers": 2}
CONFIGS = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "nf4 float32 statistics": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "fp4": {"load_in_4bit": True},
    "int8": {"load_in_8bit": True},
}
IDS = np.random.default_rng(0).integers(3, 99, (2, 12))


def torch_quantized(folder: Path, name: str = "nf4", dtype: str = "float32", **settings):
    """transformers' own model of the folder, quantised by bitsandbytes while it is loaded.

    In training mode: in evaluation bitsandbytes multiplies in bfloat16 on processors that can.
    """
    config = transformers.BitsAndBytesConfig(**CONFIGS[name], **settings)
    return transformers.AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=dtype).train()


def stored(folder: Path) -> dict[str, torch.Tensor]:
    with safe_open(folder / "model.safetensors", "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def torch_logits(model) -> np.ndarray:
    with torch.no_grad():
        return model(torch.tensor(IDS)).logits.float().numpy()


def relative(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.abs(np.asarray(a) - np.asarray(b)).max() / np.abs(np.asarray(b)).max())


class TestFiles:
    @pytest.mark.parametrize("name", CONFIGS)
    def test_theirs_and_ours_there_and_back(self, tmp_path, name):
        torch_phi3(tmp_path / "base", **SIZES)
        theirs = torch_quantized(tmp_path / "base", name)
        theirs.save_pretrained(tmp_path / "theirs")
        model = Phi3ForCausalLM.from_pretrained(str(tmp_path / "theirs"), dtype=jnp.float32)
        model.save_pretrained(str(tmp_path / "ours"))

        ours = stored(tmp_path / "ours")
        expected = stored(tmp_path / "theirs")
        assert ours.keys() == expected.keys()
        for key, tensor in expected.items():
            assert (ours[key].dtype, ours[key].shape) == (tensor.dtype, tensor.shape), key
            assert ours[key].numpy().tobytes() == tensor.numpy().tobytes(), key
        sections = [json.loads((tmp_path / f / "config.json").read_text()) for f in ("ours", "theirs")]
        assert sections[0]["quantization_config"] == sections[1]["quantization_config"]

        loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", dtype="float32").train()
        assert relative(torch_logits(loaded), torch_logits(theirs)) < 1e-6
        # In training on a CPU bitsandbytes leaves the activations of an 8-bit layer unrounded, as we do.
        assert relative(model(IDS), torch_logits(theirs)) < 1e-5

    @pytest.mark.parametrize("name", ["nf4 float32 statistics", "int8"])
    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    def test_quantised_while_loading(self, tmp_path, name, dtype):
        """The bytes are those that transformers and bitsandbytes make of the same 16-bit or 32-bit folder."""
        torch_phi3(tmp_path / "base", **SIZES | {"intermediate_size": 112})
        torch_quantized(tmp_path / "base", name, dtype).save_pretrained(tmp_path / "theirs")
        model = Phi3ForCausalLM.from_pretrained(
            str(tmp_path / "base"), dtype=dtype, quantization=name.split()[0], double_quant=False
        )
        model.save_pretrained(str(tmp_path / "ours"))
        ours, expected = stored(tmp_path / "ours"), stored(tmp_path / "theirs")
        assert ours.keys() == expected.keys()
        assert all(torch.equal(ours[key].view(torch.uint8), expected[key].view(torch.uint8)) for key in expected)

    def test_skipped_modules(self, tmp_path):
        torch_phi3(tmp_path / "base", **SIZES)
        theirs = torch_quantized(tmp_path / "base", llm_int8_skip_modules=["lm_head", "o_proj"])
        theirs.save_pretrained(tmp_path / "theirs")
        model = Phi3ForCausalLM.from_pretrained(str(tmp_path / "theirs"), dtype=jnp.float32)
        assert isinstance(model.model.layers.self_attn.o_proj.weight.get_value(), jax.Array)
        assert relative(model(IDS), torch_logits(theirs)) < 1e-5
        model.save_pretrained(str(tmp_path / "ours"))
        loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", dtype="float32").train()
        assert relative(torch_logits(loaded), torch_logits(theirs)) < 1e-6


@pytest.fixture(scope="module", params=["nf4", "int8"])
def qlora(request, tmp_path_factory):
    """The kind, our quantised model and an adapter for it, and PEFT's loss and gradients on bitsandbytes' model."""
    folder = tmp_path_factory.mktemp("qlora")
    torch_phi3(folder / "base", **SIZES)
    torch_quantized(folder / "base", request.param).save_pretrained(folder / "quantized")
    model = Phi3ForCausalLM.from_pretrained(str(folder / "quantized"), dtype=jnp.float32)
    lora = init_lora(model, LoraConfig(r=4, lora_alpha=2, init_lora_weights=False), jax.random.key(0))
    save_adapter(folder / "adapter", lora)
    base = transformers.AutoModelForCausalLM.from_pretrained(
        folder / "quantized", dtype="float32", attn_implementation="eager"
    )
    theirs = peft.PeftModel.from_pretrained(base, folder / "adapter", is_trainable=True).train()
    value = theirs(torch.tensor(IDS), labels=torch.tensor(IDS)).loss
    value.backward()
    gradients = {name: p.grad.numpy() for name, p in theirs.named_parameters() if p.requires_grad}
    return request.param, model, lora, value.item(), gradients


class TestTraining:
    def test_gradients_of_the_adapter_are_those_of_peft(self, qlora):
        """QLoRA in float32, relative to the largest number of each gradient."""
        kind, model, lora, expected, theirs = qlora
        batch, remat = {"input_ids": jnp.asarray(IDS)}, kind == "nf4"
        value, grads = jax.jit(jax.value_and_grad(lambda lora: loss(model, lora, batch, remat=remat)))(lora)
        assert abs(float(value) - expected) < 1e-6 * expected
        assert len(theirs) == 2 * 4 * SIZES["num_hidden_layers"]
        for name, adapter in grads.items():
            for part in ("lora_A", "lora_B"):
                for layer, gradient in enumerate(getattr(adapter, part)):
                    module = name.replace("model.layers", f"model.layers.{layer}")
                    reference = theirs[f"base_model.model.{module}.{part}.default.weight"]
                    assert relative(gradient, reference) < 1e-5, (module, part)

    @pytest.mark.slow
    @pytest.mark.parametrize("storage", ["uint8", "bfloat16", "float32"])
    def test_modules_skipped_in_some_layers_and_another_storage(self, tmp_path, storage):
        """As Unsloth's dynamic quants name modules, some of which are not there."""
        torch_phi3(tmp_path / "base", **SIZES)
        skipped = [
            "lm_head",
            "multi_modal_projector",
            "merger",
            "model.layers.1.mlp",
            "model.layers.0.self_attn.o_proj",
        ]
        kind = getattr(torch, storage)
        theirs = torch_quantized(tmp_path / "base", llm_int8_skip_modules=skipped, bnb_4bit_quant_storage=kind)
        theirs.save_pretrained(tmp_path / "theirs")
        model = Phi3ForCausalLM.from_pretrained(str(tmp_path / "theirs"), dtype=jnp.float32)
        assert relative(model(jnp.asarray(IDS)), torch_logits(theirs)) < 1e-5
        assert isinstance(model.model.layers.self_attn.qkv_proj.weight.get_value(), NF4Weight)
        assert not isinstance(model.model.layers.mlp.down_proj.weight.get_value(), NF4Weight)

    def test_a_model_in_memory_is_quantised_alike(self, tmp_path):
        torch_phi3(tmp_path / "base", **SIZES)
        plain = Phi3ForCausalLM.from_pretrained(str(tmp_path / "base"), dtype=jnp.float32)
        loaded = Phi3ForCausalLM.from_pretrained(str(tmp_path / "base"), dtype=jnp.float32, quantization="nf4")
        quantized = quantize_model(plain, "nf4")
        for ours, expected in zip(jax.tree.leaves(quantized), jax.tree.leaves(loaded), strict=True):
            assert same_bits(np.asarray(ours), np.asarray(expected))


def test_an_object_of_transformers_in_a_run_configuration():
    config = transformers.BitsAndBytesConfig(**CONFIGS["nf4"], bnb_4bit_compute_dtype="bfloat16")
    run, _ = parse_run_config({"model": {"name_or_path": "x", "quantization_config": config}, "data": {"train": "x"}})
    assert (run.model.quantization, run.model.double_quant, run.model.dtype) == ("nf4", True, "bfloat16")
