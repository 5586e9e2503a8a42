"""PEFT's files of every variant, without PEFT: there and back, and what is in them."""

import json
import struct
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import numpy as safetensors

from phi3_jax import InputError, LoraConfig, Phi3ForCausalLM
from phi3_jax.hf.safetensors_io import read_metadata
from phi3_jax.lora import LoraLinear, init_lora
from phi3_jax.lora.adapters import DoraLinear
from phi3_jax.peft.adapter import load_adapter
from phi3_jax.peft.save import save_adapter
from phi3_jax.system.dotted import nested
from tests.helpers.models import smallest_model
from tests.helpers.peft_files import assert_same, config_of, edit_config, random_lora, tensors

LLAMA = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LAYER = "base_model.model.model.layers.{}."
QKV = LAYER + "self_attn.qkv_proj."


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def model(request) -> Phi3ForCausalLM:
    return smallest_model(tie_word_embeddings=request.param)


@pytest.fixture(scope="module")
def untied() -> Phi3ForCausalLM:
    return smallest_model()


ROUND_TRIPS = {
    "dora": {"use_dora": True, "target_modules": ["qkv_proj", "lm_head", "embed_tokens"]},
    "lora_bias": {"lora_bias": True, "target_modules": ["o_proj", "lm_head"]},
    "patterns": {
        "target_modules": "all-linear",
        "rank_pattern": {r"layers\.[01]\.mlp\..*": 5, "qkv_proj": 3},
        "alpha_pattern": {"model.layers.2.self_attn.o_proj": 2.5},
        "use_rslora": True,
    },
    "layers": {"layers_to_transform": [2, 0], "layers_pattern": "layers", "lora_dropout": 0.1},
    "one layer": {"layers_to_transform": 1},
    "exclude": {"target_modules": "all-linear", "exclude_modules": ["qkv_proj", "model.layers.1.mlp.down_proj"]},
    "regex": {"target_modules": r".*layers\.[12]\.mlp\.down_proj|lm_head"},
    "saved": {"modules_to_save": ["norm", "lm_head", "gate_up_proj"], "target_modules": "all-linear"},
    "tokens": {"trainable_token_indices": [7, 3]},
    "tokens by module": {"trainable_token_indices": {"embed_tokens": [7, 3], "lm_head": [7, 3]}},
    "gaussian": {"init_lora_weights": "gaussian"},
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "llama": {"target_modules": LLAMA},
    "llama dora": {"target_modules": LLAMA, "use_dora": True, "rank_pattern": {"layers.1.self_attn.v_proj": 4}},
    "slices": {
        "target_modules": ["q_proj", "up_proj", "v_proj"],
        "rank_pattern": {"v_proj": 4},
        "alpha_pattern": {"v_proj": 32},  # twice the scale: no rounding
        "layers_to_transform": [0, 2],
    },
    "slices of two ranks": {"target_modules": ["q_proj", "v_proj"], "rank_pattern": {"v_proj": 4}},
    "slices with bias": {"target_modules": ["v_proj", "o_proj"], "lora_bias": True, "use_rslora": True},
    "slices here, whole there": {
        "target_modules": r".*layers\.0.*\.(q|v)_proj|.*layers\.2.*\.qkv_proj",
        "rank_pattern": {"q_proj": 1},
    },
}


@pytest.mark.parametrize("variant", ROUND_TRIPS)
def test_round_trip(model, tmp_path, variant):
    lora = random_lora(model, **ROUND_TRIPS[variant])
    save_adapter(tmp_path, lora)
    assert_same(load_adapter(tmp_path, model), lora)


def test_names_on_disk(untied, tmp_path):
    save_adapter(tmp_path / "a", random_lora(untied, use_dora=True, target_modules=["qkv_proj", "embed_tokens"]))
    embedding = "base_model.model.model.embed_tokens."
    assert {f"{QKV}lora_magnitude_vector".format(i) for i in range(3)} < set(tensors(tmp_path / "a"))
    assert {n.removeprefix(embedding): t.shape for n, t in tensors(tmp_path / "a").items() if embedding in n} == {
        "lora_embedding_A": (2, 19),
        "lora_embedding_B": (16, 2),
        "lora_magnitude_vector": (16,),
    }
    others = {
        "lora_bias": True,
        "target_modules": ["o_proj"],
        "modules_to_save": ["model.norm", "input_layernorm", "down_proj"],
        "trainable_token_indices": {"embed_tokens": [3, 1], "lm_head": [4]},
    }
    save_adapter(tmp_path / "b", random_lora(untied, **others))
    assert {name for name in tensors(tmp_path / "b") if ".1." not in name and ".2." not in name} == {
        *((LAYER + "self_attn.o_proj." + end).format(0) for end in ("lora_A.weight", "lora_B.weight", "lora_B.bias")),
        *((LAYER + end).format(0) for end in ("input_layernorm.weight", "mlp.down_proj.weight")),
        "base_model.model.model.norm.weight",
        "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta",
        "base_model.model.lm_head.token_adapter.trainable_tokens_delta",
    }
    raw = config_of(tmp_path / "b")
    assert raw["modules_to_save"] == ["input_layernorm", "mlp.down_proj", "model.norm"]
    assert raw["trainable_token_indices"] == {"embed_tokens": [3, 1], "lm_head": [4]}
    assert (raw["lora_bias"], raw["use_dora"]) == (True, False)


def test_dense_adapters_of_fused_layers_stay_whole(untied, tmp_path):
    lora = random_lora(untied, target_modules=["qkv_proj", "gate_up_proj"])
    save_adapter(tmp_path, lora)
    assert read_metadata(tmp_path / "adapter_model.safetensors") == {"format": "pt"}
    assert_same(load_adapter(tmp_path, untied), lora)


def test_what_no_configuration_of_pefts_describes(untied, tmp_path):
    lora = random_lora(untied, target_modules=["o_proj", "down_proj"])
    attention = lora.adapters["model"]["layers"]["self_attn"]["o_proj"]
    dora = DoraLinear(attention.lora_A, attention.lora_B, jnp.ones((3, 16)), attention.scaling)
    items = {**dict(lora.items()), "model.layers.self_attn.o_proj": dora}
    with pytest.raises(InputError, match="some adapters have use_dora and others not"):
        save_adapter(tmp_path / "a", replace(lora, adapters=nested(items)))


@pytest.mark.parametrize(("rslora", "alpha"), [(False, 16), (True, 8 * 2**0.5)])
def test_starts_from_the_weights_become_plain(untied, tmp_path, rslora, alpha):
    settings = {"target_modules": ["v_proj", "o_proj"], "init_lora_weights": "olora"}
    lora = init_lora(untied, LoraConfig(r=2, lora_alpha=8, use_rslora=rslora, **settings), jax.random.key(0))
    save_adapter(tmp_path / "fresh", lora)
    raw = config_of(tmp_path / "fresh")
    assert (raw["r"], raw["lora_alpha"], raw["init_lora_weights"]) == (4, pytest.approx(alpha, rel=1e-14), True)
    # Nothing has trained: a change of exactly zero, in whatever order it is added up.
    for name, tensor in tensors(tmp_path / "fresh").items():
        assert (np.abs(tensor).max() > 0) == ("lora_A" in name)
    # One of B's columns has moved: the other still says nothing.
    o_proj = lora.adapters["model"]["layers"]["self_attn"]["o_proj"]
    moved = replace(o_proj, lora=replace(o_proj.lora, lora_B=o_proj.lora.lora_B.at[1, 3, 1].add(1.0)))
    items = {**dict(lora.items()), "model.layers.self_attn.o_proj": moved}
    save_adapter(tmp_path / "moved", replace(lora, adapters=nested(items)))
    b = tensors(tmp_path / "moved")[(LAYER + "self_attn.o_proj.lora_B.weight").format(1)]
    assert [bool(column.any()) for column in b.T] == [False, True, False, True]
    loaded = dict(load_adapter(tmp_path / "moved", untied).items())["model.layers.self_attn.o_proj"]
    assert isinstance(loaded, LoraLinear)
    expected = moved.lora.lora_B[1] @ moved.lora.lora_A[1] - moved.start_B[1] @ moved.start_A[1]
    np.testing.assert_allclose(loaded.lora_B[1] @ loaded.lora_A[1], expected, atol=1e-6)
    assert loaded.scaling == pytest.approx(moved.scaling, rel=1e-14)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"use_dora": True}, "3 missing (base_model.model.model.layers.0.mlp.down_proj.lora_magnitude_vector"),
        ({"lora_bias": True}, "missing (base_model.model.model.layers.0.mlp.down_proj.lora_B.bias"),
        ({"modules_to_save": ["norm"]}, "7 missing (base_model.model.model.layers.0.input_layernorm.weight"),
        ({"modules_to_save": ["nothing"]}, "modules_to_save: nothing matches nothing"),
        ({"modules_to_save": ["layers.0.mlp"]}, "matches 1 of the 3 layers"),
        ({"trainable_token_indices": [3]}, "1 missing (base_model.model.model.embed_tokens.token_adapter"),
        ({"trainable_token_indices": {"norm": [3]}}, "trainable_token_indices names norm"),
        ({"rank_pattern": {"down_proj": 3}}, "6 misshapen"),
        ({"layers_to_transform": [0]}, "4 unknown"),
        ({"use_dora": True, "lora_bias": True}, "peft.lora_bias and peft.use_dora are both true"),
    ],
)
def test_features_that_the_tensors_do_not_bear_out(untied, tmp_path, change, message):
    save_adapter(tmp_path, random_lora(untied, target_modules=["down_proj"]))
    edit_config(tmp_path, **change)
    with pytest.raises(InputError) as error:
        load_adapter(tmp_path, untied)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_saved_weights_of_another_shape_or_not_finite(untied, tmp_path):
    save_adapter(tmp_path, random_lora(untied, modules_to_save=["lm_head"]))
    path = tmp_path / "adapter_model.safetensors"
    found = tensors(tmp_path)
    for weight, message in (
        (
            np.zeros((20, 16), np.float32),
            "1 misshapen (base_model.model.lm_head.weight is [20, 16], expected [19, 16])",
        ),
        (np.full((19, 16), np.nan, np.float32), "1 not finite (base_model.model.lm_head.weight)"),
    ):
        safetensors.save_file({**found, "base_model.model.lm_head.weight": weight}, path)
        with pytest.raises(InputError) as error:
            load_adapter(tmp_path, untied)
        assert message in str(error.value)


def test_metadata_that_is_no_text(tmp_path):
    header = json.dumps({"__metadata__": {"a": 1}}).encode()
    path = tmp_path / "broken.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header)
    with pytest.raises(InputError, match="__metadata__ is not a mapping of texts"):
        read_metadata(path)
