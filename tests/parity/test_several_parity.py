"""Several adapters at once against PEFT: `add_weighted_adapter`, and batches with `adapter_names`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

from phi3_jax import LoraConfig, Phi3ForCausalLM  # noqa: E402
from phi3_jax.lora import init_lora, per_row, weighted_sum  # noqa: E402
from phi3_jax.lora.stack import stacked, unstacked  # noqa: E402
from phi3_jax.lora.targets import checkpoint_name  # noqa: E402
from phi3_jax.lora.tree import Lora  # noqa: E402
from tests.helpers.references import torch_phi3  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")

IDS = np.array([[1, 17, 5, 98, 33, 64], [44, 45, 2, 90, 11, 11], [7, 8, 9, 10, 5, 12], [3, 3, 60, 61, 62, 4]])
SIZES = {"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 48, "num_key_value_heads": 2}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    torch_phi3(folder, **SIZES)
    return folder, Phi3ForCausalLM.from_pretrained(str(folder), dtype=jnp.float32)


def both(base, *configs):
    """A PEFT model with one random adapter for each configuration, "0", "1" and so on; and ours."""
    folder, ours = base
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    configs = [{"r": 3, "lora_alpha": 5, "task_type": "CAUSAL_LM", **config} for config in configs]
    for i, config in enumerate(configs):
        wanted = peft.LoraConfig(**config)
        if i == 0:
            model = peft.get_peft_model(model, wanted, adapter_name="0")
        else:
            model.add_adapter(str(i), wanted)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.2)
    return model.eval(), [from_torch(model, str(i), ours, config) for i, config in enumerate(configs)]


def from_torch(model, adapter_name, ours, config) -> Lora:
    """Our adapter with PEFT's arrays."""
    lora = jax.eval_shape(lambda: init_lora(ours, LoraConfig(**config), jax.random.key(0)))
    zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), lora)
    items = {}
    for name, adapter in zeros.items():
        if name.startswith("model.layers."):
            layers = {i: filled(model, checkpoint_name(name, i), adapter_name, own) for i, own in unstacked(adapter)}
            items[name] = stacked(layers, SIZES["num_hidden_layers"])
        else:
            items[name] = filled(model, name, adapter_name, adapter)
    return Lora.from_items(items, lora.config, slices=lora.slices)


def filled(model, name, adapter_name, own):
    layer = model.get_submodule(f"base_model.model.{name}")
    arrays = {letter: torch_array(layer, letter, adapter_name) for letter in ("A", "B")}
    found = {"lora_A": arrays["A"], "lora_B": arrays["B"]}
    if hasattr(own, "magnitude"):
        found["magnitude"] = layer.lora_magnitude_vector[adapter_name].weight.detach().numpy()
    if getattr(own, "lora_bias", None) is not None:
        found["lora_bias"] = layer.lora_B[adapter_name].bias.detach().numpy()
    assert all(array.shape == getattr(own, field).shape for field, array in found.items())
    return jax.tree_util.tree_map(jnp.asarray, type(own)(**{**vars(own), **found}))


def torch_array(layer, letter, adapter_name):
    if adapter_name in getattr(layer, f"lora_{letter}"):
        return getattr(layer, f"lora_{letter}")[adapter_name].weight.detach().numpy()
    return getattr(layer, f"lora_embedding_{letter}")[adapter_name].detach().numpy()


def torch_logits(model, **kwargs):
    with torch.no_grad():
        return model(torch.tensor(IDS), use_cache=False, **kwargs).logits.numpy()


def assert_close(ours, theirs, rtol=1e-5):
    theirs = np.asarray(theirs)
    assert np.abs(np.asarray(ours) - theirs).max() <= rtol * np.abs(theirs).max()


def assert_different(a, b):
    assert np.abs(np.asarray(a) - np.asarray(b)).max() > 0.05 * np.abs(np.asarray(b)).max()


EVERYTHING = {"target_modules": ["qkv_proj", "o_proj", "lm_head", "embed_tokens"]}
SOME = {"target_modules": ["o_proj", "down_proj", "embed_tokens"], "lora_alpha": 4}


@pytest.mark.parametrize(("kind", "rank", "total"), [("cat", 2, 5), ("linear", 3, 3), ("svd", 2, 3)])
def test_weighted_sums(base, kind, rank, total):
    model, loras = both(base, EVERYTHING, {**SOME, "r": rank})
    weights = [0.7, -1.3]
    model.base_model.add_weighted_adapter(["0", "1"], weights, "sum", combination_type=kind)
    theirs = model.peft_config["sum"]
    lora = weighted_sum(loras, weights, kind)
    assert (lora.config.r, lora.config.lora_alpha) == (theirs.r, theirs.lora_alpha) == (total, total)
    assert set(lora.config.target_modules) == theirs.target_modules
    for name, adapter in lora.items():
        for layer, own in unstacked(adapter) if name.startswith("model.layers.") else [(None, adapter)]:
            torch_layer = model.get_submodule(
                f"base_model.model.{name if layer is None else checkpoint_name(name, layer)}"
            )
            assert own.scaling == torch_layer.scaling["sum"] == 1
            a, b = (torch_array(torch_layer, letter, "sum") for letter in "AB")
            assert (own.lora_A.shape, own.lora_B.shape) == (a.shape, b.shape)
            if kind == "svd":  # either may have the sign
                assert_close(own.lora_B @ own.lora_A, b @ a)
                assert_close(np.linalg.norm(own.lora_B, axis=0), np.linalg.norm(b, axis=0))
            else:
                np.testing.assert_allclose(own.lora_A, a, rtol=1e-6, atol=1e-7)
                np.testing.assert_allclose(own.lora_B, b, rtol=1e-6, atol=1e-7)
    model.set_adapter("sum")
    assert_close(base[1](IDS, lora=lora), torch_logits(model))


@pytest.mark.parametrize(
    "configs",
    [
        ({"target_modules": ["o_proj"], "use_rslora": True}, {"target_modules": ["o_proj"]}),
        ({"target_modules": ["o_proj"], "lora_bias": True}, {"target_modules": ["o_proj"]}),
        ({"target_modules": ["o_proj"], "layers_to_transform": [0]}, {"target_modules": ["o_proj"]}),
    ],
    ids=["rslora", "lora_bias", "layers_to_transform"],
)
def test_where_pefts_sum_is_not_the_sum(base, configs):
    """Both adapters of PEFT at work at once are what a sum with weights of 1 must be."""
    model, loras = both(base, *configs)
    model.base_model.set_adapter(["0", "1"])
    at_once = torch_logits(model)
    assert_close(base[1](IDS, lora=weighted_sum(loras, [1, 1])), at_once)
    model.base_model.add_weighted_adapter(["0", "1"], [1.0, 1.0], "sum", combination_type="cat")
    model.set_adapter("sum")
    assert np.abs(torch_logits(model) - at_once).max() > 1e-3 * np.abs(at_once).max()


@pytest.mark.parametrize(
    "configs",
    [
        (EVERYTHING, {**SOME, "r": 2, "use_rslora": True}),
        ({"target_modules": ["o_proj"], "lora_bias": True, "layers_to_transform": [1]}, SOME),
    ],
    ids=["plain", "bias"],
)
def test_rows_with_adapters_of_their_own(base, configs):
    model, loras = both(base, *configs)
    rows = [1, -1, 0, 1]
    names = ["__base__" if row < 0 else str(row) for row in rows]
    mixed = torch_logits(model, adapter_names=names)
    assert_close(base[1](IDS, lora=per_row(loras, rows)), mixed)
    for row in (0, 2, 3):
        assert_different(mixed[row], np.asarray(base[1](IDS))[row])


def test_rows_with_dora(base):
    """PEFT refuses `adapter_names` with DoRA, so here each row is what PEFT makes of it alone."""
    model, loras = both(
        base, {"target_modules": ["o_proj", "embed_tokens"], "use_dora": True}, {"target_modules": ["o_proj"]}
    )
    ours = np.asarray(base[1](IDS, lora=per_row(loras, [1, -1, 0, 1])))
    for name, rows in (("0", [2]), ("1", [0, 3])):
        model.set_adapter(name)
        assert_close(ours[rows], torch_logits(model)[rows])
    with model.disable_adapter():
        assert_close(ours[[1]], torch_logits(model)[[1]])
