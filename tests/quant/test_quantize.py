"""Quantised models: loaded, run, trained, and what stands in memory meanwhile."""

import threading
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from phi3_jax import InputError, LoraConfig, Phi3ForCausalLM, init_lora, merge_lora
from phi3_jax.hf.checkpoint import Checkpoint
from phi3_jax.objectives.next_token import loss
from phi3_jax.quant import is_quantized, make_quantizer, quantize_model
from tests.helpers.models import QUANTIZABLE, quantizable_model

IDS = jnp.asarray(np.random.default_rng(0).integers(3, 48, (2, 10)))
LINEARS = {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"}
KINDS = ["nf4", "int8"]


def values(model) -> dict[str, object]:
    return {".".join(map(str, path[:-1])): leaf.get_value() for path, leaf in nnx.to_flat_state(nnx.state(model))}


def made_dense(model) -> Phi3ForCausalLM:
    """The same numbers in plain arrays."""
    leaves = []
    for path, leaf in nnx.to_flat_state(nnx.state(model)):
        value = leaf.get_value()
        dense = jax.vmap(lambda one: one.dequantize(jnp.float32))(value) if is_quantized(value) else value
        leaves.append((path, leaf.replace(dense)))
    return nnx.merge(nnx.graphdef(model), nnx.from_flat_state(leaves))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    quantizable_model().save_pretrained(str(folder))
    return folder


class TestQuantizeModel:
    @pytest.mark.parametrize("kind", KINDS)
    def test_only_the_layers_linear_weights(self, kind):
        plain = quantizable_model()
        quantized = values(quantize_model(plain, kind))
        before = values(plain)
        assert {name for name, value in quantized.items() if is_quantized(value)} == {
            name for name in before if name.rpartition(".")[2] in LINEARS
        }
        for name, value in quantized.items():
            assert value.shape == before[name].shape
            if not is_quantized(value):
                assert value is before[name]
        assert not any(map(is_quantized, values(plain).values()))

    def test_refuses_other_kinds_and_quantised_models(self):
        with pytest.raises(InputError, match="quantization is {'load_in_4bit': True}, expected one of nf4, int8"):
            make_quantizer({"load_in_4bit": True})  # no text, and without a hash
        with pytest.raises(InputError, match="quantization is 'nf5', expected one of nf4, int8"):
            quantize_model(quantizable_model(), "nf5")
        with pytest.raises(InputError, match="is quantised already"):
            quantize_model(quantize_model(quantizable_model(), "nf4"), "int8")

    def test_names_the_weight_that_cannot_be_quantised(self):
        model = quantizable_model()
        weight = model.model.layers.mlp.down_proj.weight
        weight.set_value(weight[...].at[1, 0, 0].set(jnp.nan))
        with pytest.raises(InputError, match=r"^model\.layers\.1\.mlp\.down_proj: .*NaN"):
            quantize_model(model, "nf4")

    def test_an_adapter_is_not_merged_into_it(self):
        model = quantize_model(quantizable_model(), "nf4")
        lora = init_lora(model, LoraConfig(r=2), jax.random.key(0))
        with pytest.raises(InputError, match="merge into the unquantised base"):
            merge_lora(model, lora)


@jax.jit
def value_and_grad(lora, model):
    return jax.value_and_grad(lambda lora: loss(model, lora, {"input_ids": IDS}))(lora)


class TestComputing:
    @pytest.mark.parametrize("kind", KINDS)
    def test_loss_and_gradients_are_those_of_the_same_numbers_unpacked(self, kind):
        model = quantize_model(quantizable_model(), kind)
        lora = init_lora(model, LoraConfig(r=2, init_lora_weights=False), jax.random.key(0))
        ours, expected = value_and_grad(lora, model), value_and_grad(lora, made_dense(model))
        for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True):
            assert np.allclose(a, b, rtol=1e-6, atol=1e-6)

    @pytest.mark.optimized
    def test_only_the_layer_at_work_is_dense(self):
        """Also without rematerialisation the step's temporary memory has one dense layer, and not six."""
        layers, hidden, inner = 6, 256, 512
        model = quantizable_model(num_hidden_layers=layers, hidden_size=hidden, intermediate_size=inner)
        quantized = quantize_model(model, "nf4")
        lora = init_lora(quantized, LoraConfig(r=1, target_modules=["o_proj"]), jax.random.key(0))
        temporaries = value_and_grad.lower(lora, quantized).compile().memory_analysis().temp_size_in_bytes
        one_layer = 4 * hidden * (2 * hidden + hidden + 3 * inner)  # bytes of its weights in float32
        assert one_layer / 4 < temporaries < 3 * one_layer


class TestLoading:
    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("double_quant", [True, False])
    def test_gives_what_quantising_in_memory_gives(self, folder, kind, double_quant):
        loaded = Checkpoint.open(folder).load_model(dtype=jnp.bfloat16, quantization=kind, double_quant=double_quant)
        plain = Checkpoint.open(folder).load_model(dtype=jnp.bfloat16)
        expected = quantize_model(plain, kind, double_quant=double_quant)
        assert jax.tree.structure(loaded) == jax.tree.structure(expected)
        assert all(map(np.array_equal, jax.tree.leaves(loaded), jax.tree.leaves(expected)))

    def test_never_more_than_a_few_weights_unquantised(self, folder):
        lock, alive, most = threading.Lock(), set(), 0

        def forget(key):
            with lock:
                alive.discard(key)

        def watching(name, weight):
            nonlocal most
            with lock:
                alive.add(name)
                most = max(most, len(alive))
            weakref.finalize(weight, forget, name)
            return quantize(name, weight)

        quantize = make_quantizer("nf4")
        model = Checkpoint.open(folder).load_model(dtype=jnp.bfloat16, quantizer=watching)
        assert all(is_quantized(value) for name, value in values(model).items() if name.rpartition(".")[2] in LINEARS)
        assert 1 <= most <= 8  # threads that read
        assert not alive

    def test_a_quantizer_sees_every_weight_in_the_type_asked_for(self, folder):
        seen = {}

        def recording(name, weight):
            seen[name] = weight.copy()
            return make_quantizer("nf4")(name, weight)

        Checkpoint.open(folder).load_model(dtype=jnp.bfloat16, quantizer=recording)
        plain = Checkpoint.open(folder).load_model(dtype=jnp.bfloat16)
        assert len(seen) == len(LINEARS) * QUANTIZABLE["num_hidden_layers"]
        weight = plain.model.layers.mlp.down_proj.weight[...][2]
        assert np.array_equal(seen["model.layers.2.mlp.down_proj"], weight)
        assert seen["model.layers.2.mlp.down_proj"].dtype == jnp.bfloat16

    def test_layers_must_be_of_one_kind(self, folder):
        kinds = {"0": "nf4", "1": "int8", "2": "nf4"}
        with pytest.raises(InputError, match=r"model\.layers\.1\..* is quantised otherwise than layer 0"):
            Checkpoint.open(folder).load_model(
                dtype=jnp.float32, quantizer=lambda name, w: make_quantizer(kinds[name.split(".")[2]])(name, w)
            )
