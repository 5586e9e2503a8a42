"""PEFT's files of every variant, without PEFT: there and back, and what is in them."""

import json
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import numpy as safetensors

from phi3_jax import InputError, LoraConfig, Phi3ForCausalLM
from phi3_jax.hf.safetensors_io import read_metadata
from phi3_jax.lora import Lora, LoraLinear, init_lora
from phi3_jax.lora.adapters import DoraLinear
from phi3_jax.peft.adapter import load_adapter
from phi3_jax.peft.save import save_adapter
from phi3_jax.system.dotted import nested
from tests.helpers.models import smallest_model

LLAMA = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LAYER = "base_model.model.model.layers.{}."
QKV = LAYER + "self_attn.qkv_proj."


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def model(request) -> Phi3ForCausalLM:
    return smallest_model(tie_word_embeddings=request.param)


@pytest.fixture(scope="module")
def untied() -> Phi3ForCausalLM:
    return smallest_model()


def random_lora(model: Phi3ForCausalLM, **config: Any) -> Lora:
    """What init_lora makes, with random numbers everywhere."""
    settings = LoraConfig(**{"r": 2, "lora_alpha": 8, "target_modules": ["qkv_proj", "down_proj"], **config})
    random = np.random.default_rng(0)
    shapes = jax.eval_shape(lambda: init_lora(model, settings, jax.random.key(0)))
    return jax.tree.map(lambda leaf: jnp.asarray(random.normal(size=leaf.shape), jnp.float32), shapes)


def tensors(folder: Path) -> dict[str, np.ndarray]:
    return safetensors.load_file(folder / "adapter_model.safetensors")


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "adapter_config.json").read_text())


def edit_config(folder: Path, **changes: Any) -> None:
    (folder / "adapter_config.json").write_text(json.dumps({**config_of(folder), **changes}))


def without_record(folder: Path) -> None:
    """As PEFT writes the file: without our metadata."""
    safetensors.save_file(tensors(folder), folder / "adapter_model.safetensors", {"format": "pt"})
    assert read_metadata(folder / "adapter_model.safetensors") == {"format": "pt"}


def assert_same(a: Lora, b: Lora) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)


def deltas(lora: Lora, rows: dict[str, slice]) -> dict[str, np.ndarray]:
    """s · B A of the fused layers, `[L, out, in]`, put together from whatever adapters there are."""
    found: dict[str, np.ndarray] = {}
    for name, adapter in lora.items():
        delta = adapter.scaling * np.asarray(adapter.lora_B) @ np.asarray(adapter.lora_A)
        parent, _, last = name.rpartition(".")
        fused = {"q_proj": "qkv_proj", "v_proj": "qkv_proj"}.get(last, last)
        whole = found.setdefault(f"{parent}.{fused}", np.zeros((3, 32, 16)))
        whole[:, rows.get(last, slice(None))] += delta
    return found


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


def test_slices_are_written_block_diagonal_on_the_fused_name(untied, tmp_path):
    lora = random_lora(
        untied, target_modules=["q_proj", "v_proj"], rank_pattern={"v_proj": 3}, alpha_pattern={"v_proj": 12}
    )
    save_adapter(tmp_path, lora)
    raw = config_of(tmp_path)
    # r' = 2 + 3, and α' such that the scale stays 8/2 = 12/3.
    assert (raw["target_modules"], raw["r"], raw["lora_alpha"], raw["rank_pattern"]) == (["qkv_proj"], 5, 20, {})
    attention = lora.adapters["model"]["layers"]["self_attn"]
    for i in range(3):
        a, b = (tensors(tmp_path)[f"{QKV}lora_{letter}.weight".format(i)] for letter in "AB")
        np.testing.assert_array_equal(a, np.concatenate([attention[p].lora_A[i] for p in ("q_proj", "v_proj")]))
        expected = np.zeros((32, 5), np.float32)
        expected[:16, :2], expected[24:, 2:] = attention["q_proj"].lora_B[i], attention["v_proj"].lora_B[i]
        np.testing.assert_array_equal(b, expected)


def test_rank_stabilised_slices(untied, tmp_path):
    save_adapter(tmp_path, random_lora(untied, target_modules=["q_proj", "k_proj", "v_proj"], use_rslora=True))
    raw = config_of(tmp_path)
    # √n times α for n slices of one rank.
    assert (raw["r"], raw["lora_alpha"]) == (6, pytest.approx(8 * 3**0.5, rel=1e-14))


def test_slices_by_the_form_of_b_where_there_is_no_record(untied, tmp_path):
    lora = random_lora(untied, target_modules=["q_proj", "v_proj"])
    save_adapter(tmp_path, lora)
    without_record(tmp_path)
    assert_same(load_adapter(tmp_path, untied), lora)


def test_fresh_slices_are_known_by_the_record_alone(untied, tmp_path):
    lora = init_lora(untied, LoraConfig(r=2, target_modules=["q_proj", "v_proj"]), jax.random.key(0))
    save_adapter(tmp_path, lora)
    assert_same(load_adapter(tmp_path, untied), lora)
    without_record(tmp_path)
    (name, adapter), *_ = load_adapter(tmp_path, untied).items()
    assert (name, adapter.lora_A.shape) == ("model.layers.self_attn.qkv_proj", (3, 4, 16))


def test_an_edited_alpha_counts_more_than_the_record(untied, tmp_path):
    lora = random_lora(untied, target_modules=["q_proj", "v_proj"])
    save_adapter(tmp_path, lora)
    edit_config(tmp_path, lora_alpha=config_of(tmp_path)["lora_alpha"] / 2)
    loaded = load_adapter(tmp_path, untied)
    assert loaded.config.lora_alpha == 4
    rows = {"q_proj": slice(0, 16), "v_proj": slice(24, 32)}
    (whole,), (expected,) = deltas(loaded, rows).values(), deltas(lora, rows).values()
    np.testing.assert_allclose(whole, expected / 2, rtol=1e-6)


@pytest.mark.parametrize(
    "record",
    ["{", "[1]", '{"r": 2}', '{"r":2,"lora_alpha":8,"slices":{"model.layers.0.self_attn.qkv_proj":{"q_proj":7}}}'],
)
def test_a_record_without_sense_does_not_count(untied, tmp_path, record):
    lora = random_lora(untied, target_modules=["q_proj", "v_proj"])
    save_adapter(tmp_path, lora)
    safetensors.save_file(tensors(tmp_path), tmp_path / "adapter_model.safetensors", {"phi3_jax": record})
    assert_same(load_adapter(tmp_path, untied), lora)


def test_a_record_of_other_tensors_does_not_count(untied, tmp_path):
    save_adapter(tmp_path, random_lora(untied, target_modules=["q_proj", "v_proj"]))
    path = tmp_path / "adapter_model.safetensors"
    found = {name: tensor + ("lora_B" in name) for name, tensor in tensors(tmp_path).items()}
    safetensors.save_file(found, path, read_metadata(path))
    (name, adapter), *_ = load_adapter(tmp_path, untied).items()
    assert name == "model.layers.self_attn.qkv_proj"
    np.testing.assert_array_equal(adapter.lora_B[1], found[f"{QKV}lora_B.weight".format(1)])


def test_dense_adapters_of_fused_layers_stay_whole(untied, tmp_path):
    lora = random_lora(untied, target_modules=["qkv_proj", "gate_up_proj"])
    save_adapter(tmp_path, lora)
    assert read_metadata(tmp_path / "adapter_model.safetensors") == {"format": "pt"}
    assert_same(load_adapter(tmp_path, untied), lora)


def test_a_slice_of_unknown_size_is_not_written(untied, tmp_path):
    lora = random_lora(untied, target_modules=["q_proj"])
    with pytest.raises(InputError, match="does not say which rows"):
        save_adapter(tmp_path / "a", Lora.from_items(dict(lora.items()), lora.config))
    assert not (tmp_path / "a").exists()


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


def test_pefts_rules_for_what_a_file_adapts(untied, tmp_path):
    """Names given in full count whatever layers_to_transform says; what excludes nothing is no error here."""
    lora = random_lora(untied, target_modules=["lm_head", "model.layers.1.mlp.down_proj"])
    save_adapter(tmp_path, lora)
    edit_config(tmp_path, layers_to_transform=[0], exclude_modules=["score"], rank_pattern={"score": 3})
    assert_same(load_adapter(tmp_path, untied), lora)
    edit_config(tmp_path, target_modules=["lm_head", "down_proj"], layers_to_transform=1, exclude_modules=".*mlp")
    assert_same(load_adapter(tmp_path, untied), lora)
    saved = random_lora(untied, target_modules=["o_proj"], modules_to_save=["down_proj"])
    save_adapter(tmp_path / "saved", saved)
    edit_config(tmp_path / "saved", target_modules=["o_proj", "down_proj"])
    assert_same(load_adapter(tmp_path / "saved", untied), saved)
    edit_config(tmp_path, exclude_modules=r".*\.mlp\..*")
    with pytest.raises(InputError, match=r"2 unknown \(base_model.model.model.layers.1.mlp.down_proj.lora_A.weight"):
        load_adapter(tmp_path, untied)


def test_names_of_llama_models_beside_phi3s(untied, tmp_path):
    lora = random_lora(untied, target_modules=["o_proj", "down_proj"])
    save_adapter(tmp_path, lora)
    edit_config(tmp_path, target_modules=LLAMA)
    assert_same(load_adapter(tmp_path, untied), lora)


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


def test_model_card_of_variants(untied, tmp_path):
    config = {
        "target_modules": ["qkv_proj", "o_proj", "lm_head", "model.layers.1.mlp.down_proj"],
        "exclude_modules": r".*layers\.1\.self_attn.*",
        "use_dora": True,
        "rank_pattern": {"o_proj": 3},
        "modules_to_save": ["norm"],
        "trainable_token_indices": [3, 4],
        "init_lora_weights": "gaussian",
    }
    save_adapter(tmp_path, random_lora(untied, **config))
    card = (tmp_path / "README.md").read_text()
    count = sum(tensor.size for tensor in tensors(tmp_path).values())
    for row in (
        f"{count:,} parameters",
        "| kind | DoRA, started as gaussian |",
        "| modules | down_proj (layers 1), lm_head, o_proj (layers 0, 2), qkv_proj (layers 0, 2) |",
        "| rank r | 2, 3 in o_proj |",
        "| α | 8 |",
        "| scale (α/r) | by module |",
        "| whole modules | input_layernorm, model.norm, post_attention_layernorm |",
        "| rows of tokens | 2 of embed_tokens |",
    ):
        assert row in card


def test_metadata_that_is_no_text(tmp_path):
    header = json.dumps({"__metadata__": {"a": 1}}).encode()
    path = tmp_path / "broken.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header)
    with pytest.raises(InputError, match="__metadata__ is not a mapping of texts"):
        read_metadata(path)
