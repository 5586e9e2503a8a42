"""Portable adapters, read as a program reads them that knows `r` and `lora_alpha` alone."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

from phi3_jax import InputError, LoraConfig, init_lora, load_adapter, save_adapter
from phi3_jax.cli import main
from phi3_jax.hf.save import save_model
from phi3_jax.peft.portable import portable
from tests.helpers.adapters import IDS, VARIANTS, config, shaken
from tests.helpers.models import tiny_model

CASES = {
    **{name: VARIANTS[name] for name in ("ranks by layer", "pissa")},
    "slices of a layer": {"target_modules": r".*\.1\..*(q|up)_proj", "alpha_pattern": {"q_proj": 9}},
    "rslora and head": {"use_rslora": True, "target_modules": ["lm_head", "o_proj"]},
}


@pytest.fixture(scope="module")
def model():
    return tiny_model()


def read_naively(model, folder):
    """(adapter_config.json, the model with α/r · B A added to its weights, how many of them)."""
    raw = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    graph, state = nnx.split(model)
    weights = dict(nnx.to_flat_state(state))
    a_names = [name for name in tensors if "lora_A" in name]
    for name in a_names:
        a, b = tensors[name], tensors[name.replace("lora_A", "lora_B")]
        assert a.shape[0] == raw["r"]
        *path, _, _ = name.removeprefix("base_model.model.").split(".")
        layer = (int(path.pop(2)),) if path[0] == "model" else ()
        leaf = weights[(*path, "weight")]
        weights[(*path, "weight")] = leaf.replace(leaf.get_value().at[layer].add(raw["lora_alpha"] / raw["r"] * b @ a))
    return raw, nnx.merge(graph, nnx.from_flat_state(weights)), len(a_names)


@pytest.mark.parametrize("name", CASES)
def test_alpha_over_r_is_all_there_is_to_know(model, tmp_path, name):
    lora = shaken(init_lora(model, config(**CASES[name]), jax.random.key(0)))
    layers = model.config.num_hidden_layers
    save_adapter(tmp_path, portable(lora, layers))
    raw, merged, number = read_naively(model, tmp_path)
    assert (raw["use_rslora"], raw["use_dora"], raw["rank_pattern"], raw["alpha_pattern"]) == (False, False, {}, {})
    assert not {"q_proj", "up_proj"} & set(raw["target_modules"])
    assert number == sum(1 if name == "lm_head" else layers for name in raw["target_modules"])
    expected = model(IDS, lora=lora)
    bound = 2e-5 * np.abs(expected).max()
    assert np.abs(merged(IDS) - expected).max() < bound
    assert np.abs(model(IDS, lora=load_adapter(tmp_path, model)) - expected).max() < bound


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"lora_bias": True}, "lora_bias"),
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save \(lm_head\)"),
        ({"trainable_token_indices": [3]}, "adapters or token rows of embed_tokens"),
        ({"target_modules": ["embed_tokens", "o_proj"]}, "adapters or token rows of embed_tokens"),
    ],
)
def test_what_has_no_place_is_named(model, settings, message):
    lora = init_lora(model, LoraConfig(r=2, **settings), jax.random.key(0))
    with pytest.raises(InputError, match=f"^the adapter has {message}, for which .*export --merge"):
        portable(lora, model.config.num_hidden_layers)


def test_from_the_command_line(model, tmp_path, capfd):
    save_model(model, tmp_path / "base")
    lora = shaken(init_lora(model, config(**VARIANTS["slices"], use_rslora=True), jax.random.key(0)))
    save_adapter(tmp_path / "adapter", lora, base_model_name_or_path=str(tmp_path / "base"))
    files = {"tokenizer.json": b"{} ", "tokenizer_config.json": b"{}\n", "chat_template.jinja": b"{{ 1 }}"}
    for name, content in files.items():
        (tmp_path / "adapter" / name).write_bytes(content)
    out = tmp_path / "out"
    assert main(["export", str(tmp_path / "adapter"), "--portable", "--output", str(out)]) == 0
    assert {name: (out / name).read_bytes() for name in files} == files
    assert json.loads((out / "adapter_config.json").read_text())["base_model_name_or_path"] == str(tmp_path / "base")
    np.testing.assert_allclose(model(IDS, lora=load_adapter(out, model)), model(IDS, lora=lora), atol=1e-4, rtol=1e-5)
    capfd.readouterr()
    for options, message in (
        ([], "exists already"),
        (["--base-dtype", "float32"], "--base-dtype is for --merge"),
        (["--merge"], "not allowed with"),
    ):
        assert main(["export", str(tmp_path / "adapter"), "--portable", "--output", str(out), *options]) == 2
        error = capfd.readouterr().err
        assert message in error
        assert error.count("\n") == 1


def test_dora_from_the_command_line_leaves_nothing_behind(model, tmp_path, capfd):
    save_model(model, tmp_path / "base")
    lora = init_lora(model, config(use_dora=True), jax.random.key(0))
    save_adapter(tmp_path / "adapter", lora, base_model_name_or_path=str(tmp_path / "base"))
    out = tmp_path / "out"
    assert main(["export", str(tmp_path / "adapter"), "--portable", "--output", str(out)]) == 2
    assert "use_dora" in capfd.readouterr().err
    assert not out.exists()
    assert jnp.isfinite(model(IDS, lora=load_adapter(tmp_path / "adapter", model))).all()
