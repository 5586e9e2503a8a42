"""Adapters of slices."""

from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors import numpy as safetensors

from phi3_jax import InputError, LoraConfig, Phi3ForCausalLM
from phi3_jax.hf.safetensors_io import read_metadata
from phi3_jax.lora import Lora, init_lora
from phi3_jax.peft.adapter import load_adapter
from phi3_jax.peft.save import save_adapter
from tests.helpers.models import smallest_model
from tests.helpers.peft_files import assert_same, config_of, edit_config, random_lora, tensors

LAYER = "base_model.model.model.layers.{}."


QKV = LAYER + "self_attn.qkv_proj."


@pytest.fixture(scope="module")
def untied() -> Phi3ForCausalLM:
    return smallest_model()


def without_record(folder: Path) -> None:
    """As PEFT writes the file: without our metadata."""
    safetensors.save_file(tensors(folder), folder / "adapter_model.safetensors", {"format": "pt"})
    assert read_metadata(folder / "adapter_model.safetensors") == {"format": "pt"}


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


def test_a_slice_of_unknown_size_is_not_written(untied, tmp_path):
    lora = random_lora(untied, target_modules=["q_proj"])
    with pytest.raises(InputError, match="does not say which rows"):
        save_adapter(tmp_path / "a", Lora.from_items(dict(lora.items()), lora.config))
    assert not (tmp_path / "a").exists()
