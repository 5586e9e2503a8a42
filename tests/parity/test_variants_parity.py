"""Every variant of LoRA against the real PEFT: logits, gradients, files both ways, merging."""

import json
import warnings
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

from flax import nnx  # noqa: E402
from safetensors.numpy import load_file  # noqa: E402

from phi3_jax import InputError, LoraConfig, Phi3Config, Phi3ForCausalLM  # noqa: E402
from phi3_jax.lora import init_lora, merge_lora, parameter_table  # noqa: E402
from phi3_jax.lora.stack import unstacked  # noqa: E402
from phi3_jax.peft.adapter import load_adapter  # noqa: E402
from phi3_jax.peft.save import save_adapter  # noqa: E402
from phi3_jax.peft.tensors import saved_names, tensor_names, to_peft  # noqa: E402
from phi3_jax.system.dotted import nested  # noqa: E402
from tests.helpers.references import (  # noqa: E402
    EVERYTHING,
    IDS,
    SMALL,
    assert_close,
    assert_different,
    assert_near,
    torch_base,
    torch_logits,
    torch_phi3,
)

# PEFT warns of every targeted embedding, of tied ones, and that it looked for a base's config on the hub.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")

SETTINGS = {"r": 3, "lora_alpha": 5}
SOME = ["qkv_proj", "down_proj"]
TABLES = ["qkv_proj", "lm_head", "embed_tokens"]

VARIANTS = {
    "dora": {"use_dora": True, "target_modules": EVERYTHING},
    "lora_bias": {"lora_bias": True, "target_modules": ["o_proj", "gate_up_proj"], "layers_to_transform": [0, 2]},
    "patterns": {
        "target_modules": EVERYTHING,
        "rank_pattern": {"o_proj": 1, r"layers\.[12]\.mlp\.down_proj": 5, "lm_head": 2},
        "alpha_pattern": {"model.layers.0.mlp.down_proj": 7, "qkv_proj": 2.5, "embed_tokens": 9},
    },
    "exclude_modules": {"target_modules": "all-linear", "exclude_modules": r".*layers\.1\..*|.*o_proj"},
    "regex": {"target_modules": r".*layers\.[02]\.mlp\.(gate_up|down)_proj", "lora_dropout": 0.1},
    "saved tables": {"target_modules": SOME, "modules_to_save": ["embed_tokens", "lm_head"]},
    "saved mlp": {"target_modules": "all-linear", "modules_to_save": ["mlp", "input_layernorm", "model.norm"]},
    "tokens": {
        "target_modules": SOME,
        "trainable_token_indices": {"embed_tokens": [17, 5, 98], "lm_head": [90, 17]},
    },
    "together": {
        "target_modules": [*SOME, "o_proj"],
        "use_dora": True,
        "use_rslora": True,
        "layers_to_transform": [1, 2],
        "rank_pattern": {"model.layers.1.mlp.down_proj": 6, "o_proj": 4},
        "alpha_pattern": {"qkv_proj": 11},
        "modules_to_save": ["post_attention_layernorm"],
        "trainable_token_indices": [17, 98],
        "init_lora_weights": "orthogonal",
        "r": 2,
    },
    # Where embeddings are tied, what of them trains on its own?
    "dora of tables": {"use_dora": True, "target_modules": TABLES},
    "saved head": {"target_modules": SOME, "modules_to_save": ["lm_head"]},
    "saved embedding": {"target_modules": SOME, "modules_to_save": ["embed_tokens"]},
    "tokens of both": {
        "target_modules": SOME,
        "trainable_token_indices": {"embed_tokens": [17, 5, 98], "lm_head": [17, 5, 98]},
    },
    "tokens and head": {"target_modules": ["qkv_proj", "lm_head"], "trainable_token_indices": [17, 98]},
}
TIED = ("dora of tables", "saved head", "saved embedding", "tokens of both", "tokens and head")
CASES = [
    *(pytest.param("untied", name, marks=pytest.mark.slow if name in TIED else ()) for name in VARIANTS),
    *(("tied", name) for name in TIED),
    pytest.param("tied", "saved tables", marks=pytest.mark.slow),
]


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """(folder, our model) of two small random checkpoints."""
    found = {}
    for name in ("untied", "tied"):
        folder = tmp_path_factory.mktemp(name)
        torch_phi3(folder, **SMALL, tie_word_embeddings=name == "tied")
        found[name] = folder, Phi3ForCausalLM.from_pretrained(str(folder), dtype=jnp.float32)
    return found


def is_trained(name):
    return any(part in name for part in ("lora_", "modules_to_save.", "trainable_tokens_delta"))


def trained(model):
    """A PEFT model's trainable parameters by their names in PEFT's files."""
    return {
        name.replace(".modules_to_save.default", "").replace(".default", "").replace("_vector.weight", "_vector"): p
        for name, p in model.named_parameters()
        if is_trained(name)
    }


def torch_peft(folder, dtype=torch.float32, **config):
    """A PEFT model in evaluation mode whose trainable parameters have all moved, as after some training."""
    torch.manual_seed(1)
    settings = {**SETTINGS, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **config}
    model = peft.get_peft_model(torch_base(folder, dtype), peft.LoraConfig(**settings)).eval()
    with torch.no_grad():
        for name, parameter in trained(model).items():
            if "lora_A" in name or "lora_B" in name or "lora_embedding" in name:
                parameter.normal_(std=0.2)
            else:  # near where they start: at norms, and at the base's own weights
                parameter.mul_(torch.empty_like(parameter).uniform_(0.5, 1.5))
    return model


def from_pretrained(base_folder, folder):
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*missing adapter keys.*")
        return peft.PeftModel.from_pretrained(torch_base(base_folder), folder).eval()


def torch_gradients(model, parameters):
    """Of the mean cross-entropy; the ids include the padding token."""
    logits = model(torch.tensor(IDS), use_cache=False).logits[:, :-1].flatten(0, 1)
    torch.nn.functional.cross_entropy(logits, torch.tensor(IDS[:, 1:]).ravel()).backward()
    return {name: p.grad.numpy() for name, p in parameters.items()}


def logits_and_gradients(model, lora):
    def loss(lora):
        logits = model(IDS, lora=lora)
        log_probabilities = jax.nn.log_softmax(logits[:, :-1])
        return -jnp.mean(jnp.take_along_axis(log_probabilities, jnp.asarray(IDS)[:, 1:, None], axis=-1)), logits

    # Most of these tests' time is compiling; the arithmetic is float32 at any level of optimisation.
    unoptimised = {"xla_backend_optimization_level": 0}
    gradients, logits = jax.jit(jax.grad(loss, has_aux=True), compiler_options=unoptimised)(lora)
    return logits, gradients


def file_tensors(lora):
    """The arrays of an adapter, or of its gradient, by their names in PEFT's files."""
    modules, _, _ = to_peft(lora)
    found = {
        tensor: np.asarray(getattr(adapter, field))
        for name, adapter in modules.items()
        for field, tensor in tensor_names(name, adapter).items()
    }
    for name, weight in lora.saved.items():
        layers = weight if name.startswith("model.layers.") else weight[None]
        found |= dict(zip(saved_names(name, len(layers)), np.asarray(layers), strict=True))
    return found


def assert_same(a, b):
    """The same pytree: kinds, scales, configuration, and every number."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)


def assert_gradients_close(ours, theirs, rtol=1e-5):
    assert ours.keys() == theirs.keys()
    for name, gradient in ours.items():
        assert np.abs(theirs[name]).max() > 0, name
        assert_near(gradient, theirs[name], rtol)


@pytest.mark.parametrize(("base", "variant"), CASES)
def test_variant(bases, tmp_path, base, variant):
    folder, model = bases[base]
    config = VARIANTS[variant]
    theirs = torch_peft(folder, **config)
    theirs.save_pretrained(tmp_path / "theirs")
    lora = load_adapter(tmp_path / "theirs", model)
    expected = torch_logits(theirs)
    logits, gradients = logits_and_gradients(model, lora)
    assert_close(logits, expected)
    assert_different(logits, model(IDS))
    assert_gradients_close(file_tensors(gradients), torch_gradients(theirs, trained(theirs)))

    # What init_lora makes for this configuration, and what comes back from our own file.
    settings = LoraConfig(**{**SETTINGS, **config, "base_model_name_or_path": str(folder)})
    fresh = jax.eval_shape(lambda: init_lora(model, settings, jax.random.key(0)))
    assert jax.tree.structure(fresh) == jax.tree.structure(lora)
    assert [x.shape for x in jax.tree.leaves(fresh)] == [x.shape for x in jax.tree.leaves(lora)]
    save_adapter(tmp_path / "ours", lora)
    assert_same(load_adapter(tmp_path / "ours", model), lora)
    assert_close(torch_logits(from_pretrained(folder, tmp_path / "ours")), expected)

    if config.get("lora_bias"):  # which neither can merge: Phi-3 has no biases
        return
    merged = merge_lora(model, lora)
    assert_close(merged(IDS), expected)
    if base == "tied" and "lm_head" in config["target_modules"]:  # PEFT merges into the one table that both share
        return
    merged.save_pretrained(str(tmp_path / "merged"))
    loaded = torch_base(tmp_path / "merged").state_dict()
    for name, weight in theirs.merge_and_unload().state_dict().items():
        assert_close(loaded[name].numpy(), weight.numpy(), rtol=2e-6)


# Adapters of slices: PEFT has none, so each linear layer of the torch model gets them by a hook.

LLAMA = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SLICES = {
    "two of three": {"target_modules": ["q_proj", "v_proj"]},
    "seven": {
        "target_modules": LLAMA,
        "use_rslora": True,
        "rank_pattern": {"k_proj": 1, r"layers\.1\.mlp\.up_proj": 4},
        "alpha_pattern": {"v_proj": 7, "model.layers.2.self_attn.q_proj": 2},
    },
    "dora": {"target_modules": LLAMA, "use_dora": True},
    "lora_bias": {"target_modules": r".*layers\.[02]\.(self_attn\.q_proj|mlp\.up_proj)", "lora_bias": True},
}


def random_lora(model, **config):
    """Adapters with nothing zero, as after some training."""
    settings = LoraConfig(**{**SETTINGS, **config})
    random = np.random.default_rng(0)

    def draw(path, leaf):
        array = random.normal(0, 0.2, leaf.shape)
        return jnp.asarray(1 + np.abs(array) if path[-1].name == "magnitude" else array, jnp.float32)

    return jax.tree_util.tree_map_with_path(draw, jax.eval_shape(lambda: init_lora(model, settings, jax.random.key(0))))


def layer_adapters(lora):
    """(name of the linear layer, name of the adapter, rows, adapter of one layer) of every adapter."""
    for name, adapter in lora.items():
        for layer, one in unstacked(adapter):
            full = name.replace("layers.", f"layers.{layer}.")
            part = lora.slices.get(name)
            parent = full if part is None else part.parent.replace("layers.", f"layers.{layer}.")
            yield parent, full, slice(None) if part is None else slice(part.start, part.stop), one


def with_hooks(folder, lora):
    """The torch model with an adapter of its own on the rows of each slice, and their parameters."""
    model = torch_base(folder)
    parameters = {}
    for parent, full, rows, one in layer_adapters(lora):
        own = {field: torch.tensor(np.asarray(leaf), requires_grad=True) for field, leaf in fields_of(one).items()}
        parameters |= {f"{full}.{field}": tensor for field, tensor in own.items()}
        model.get_submodule(parent).register_forward_hook(partial(add_update, rows, own, one.scaling))
    return model, parameters


def fields_of(adapter):
    return {field: leaf for field, leaf in vars(adapter).items() if hasattr(leaf, "shape")}


def add_update(rows, own, scaling, module, inputs, output):
    (x,) = inputs
    update = scaling * x @ own["lora_A"].T @ own["lora_B"].T
    if "lora_bias" in own:
        update = update + scaling * own["lora_bias"]
    changed = output[..., rows] + update
    if "magnitude" in own:
        norm = torch.linalg.norm(module.weight[rows] + scaling * own["lora_B"] @ own["lora_A"], dim=1)
        changed = changed * (own["magnitude"] / norm.detach())
    result = output.clone()
    result[..., rows] = changed
    return result


@pytest.mark.parametrize("variant", SLICES)
def test_slices(bases, tmp_path, variant):
    folder, model = bases["untied"]
    lora = random_lora(model, **SLICES[variant])
    reference, parameters = with_hooks(folder, lora)
    expected = torch_logits(reference)
    logits, gradients = logits_and_gradients(model, lora)
    assert_close(logits, expected)
    assert_different(logits, model(IDS))
    found = {
        f"{full}.{field}": np.asarray(leaf)
        for _, full, _, one in layer_adapters(gradients)
        for field, leaf in fields_of(one).items()
    }
    # The reference is written here, and its numbers are larger: 1.5e-5 was seen with seven slices.
    assert_gradients_close(found, torch_gradients(reference, parameters), rtol=2e-5)
    if variant in ("seven", "dora"):
        assert_close(merge_lora(model, lora)(IDS), expected)

    save_adapter(tmp_path / "ours", lora)
    theirs = from_pretrained(folder, tmp_path / "ours")
    assert_close(torch_logits(theirs), expected)
    back = load_adapter(tmp_path / "ours", model)
    assert jax.tree.structure(back) == jax.tree.structure(lora)
    for ours, saved in zip(jax.tree.leaves(back), jax.tree.leaves(lora), strict=True):
        # Where a slice's scale is not the others', B is multiplied by it, and divided again.
        np.testing.assert_allclose(ours, saved, rtol=2e-7)
    save_adapter(tmp_path / "again", back)
    np.testing.assert_equal(*(load_file(tmp_path / name / "adapter_model.safetensors") for name in ("ours", "again")))

    # PEFT's file has no record of slices: the form of B tells.
    theirs.save_pretrained(tmp_path / "theirs")
    told = load_adapter(tmp_path / "theirs", model)
    assert told.slices == lora.slices
    assert_close(model(IDS, lora=told), expected)


def test_counts_of_phi3_mini():
    """29,884,416 parameters for the seven Llama names at r = 16, 25,165,824 for the four fused modules."""
    mini = nnx.eval_shape(lambda: Phi3ForCausalLM(Phi3Config(), dtype=jnp.bfloat16, rngs=nnx.Rngs(0)))
    for targets, count in ((LLAMA, 29_884_416), ("all-linear", 25_165_824)):
        lora = jax.eval_shape(lambda t=targets: init_lora(mini, LoraConfig(target_modules=t), jax.random.key(0)))
        assert parameter_table(mini, lora).trainable == count


def test_llama_names_in_a_peft_file(bases, tmp_path):
    """PEFT adapts what of them there is, o_proj and down_proj, and says nothing; its tensors decide here."""
    folder, model = bases["untied"]
    theirs = torch_peft(folder, target_modules=LLAMA)
    theirs.save_pretrained(tmp_path)
    lora = load_adapter(tmp_path, model)
    assert lora.config.target_modules == ("down_proj", "o_proj")
    assert_close(model(IDS, lora=lora), torch_logits(theirs))


# Starts that PEFT takes out of the base's weights, and that ride along here.

INITIALISERS = {
    "pissa": {"init_lora_weights": "pissa", "use_rslora": True},
    "olora": {"init_lora_weights": "olora", "rank_pattern": {"o_proj": 2}},
}


def from_the_start_of(lora, parameters):
    """Ours after some training, had its start been PEFT's, whose last bits are others."""

    def one(name, adapter):
        letters = {}
        for letter in "AB":
            arrays = [
                parameters[f"base_model.model.{name.replace('layers.', f'layers.{layer}.')}.lora_{letter}.weight"]
                for layer, _ in unstacked(adapter)
            ]
            letters[letter] = jnp.asarray(np.stack([array.detach().numpy() for array in arrays]))
        trained = {f"lora_{letter}": 1.2 * array + 0.01 for letter, array in letters.items()}
        starts = {f"start_{letter}": array for letter, array in letters.items()}
        return replace(adapter, lora=replace(adapter.lora, **trained), **starts)

    return replace(lora, adapters=nested({name: one(name, adapter) for name, adapter in lora.items()}))


@pytest.mark.parametrize("initialiser", INITIALISERS)
def test_initialisers_from_the_weights(bases, tmp_path, initialiser):
    folder, model = bases["untied"]
    settings = {**SETTINGS, "target_modules": ["qkv_proj", "o_proj"], **INITIALISERS[initialiser]}
    theirs = peft.get_peft_model(torch_base(folder), peft.LoraConfig(**settings, task_type="CAUSAL_LM")).eval()
    theirs.save_pretrained(tmp_path / "initial")
    lora = init_lora(model, LoraConfig(**settings), jax.random.key(0))
    parameters = trained(theirs)
    for _, full, _, one in layer_adapters(lora):
        a, b = (parameters[f"base_model.model.{full}.lora_{letter}.weight"].detach().numpy() for letter in "AB")
        # Singular vectors are determined up to their sign, and so each component's product.
        for j in range(one.rank):
            assert_close(np.outer(one.lora.lora_B[:, j], one.lora.lora_A[j]), np.outer(b[:, j], a[j]), rtol=2e-4)

    # Nothing has trained: PEFT's logits with our file are the base's, to the last bit, and so is the merged weight.
    base_logits = torch_logits(torch_base(folder))
    save_adapter(tmp_path / "fresh", lora)
    np.testing.assert_array_equal(torch_logits(from_pretrained(folder, tmp_path / "fresh")), base_logits)
    assert_same(*(nnx.state(m) for m in (merge_lora(model, lora), model)))
    assert_close(model(IDS, lora=lora), base_logits)

    # Both have trained from the same start to the same A and B.
    lora = from_the_start_of(lora, parameters)
    with torch.no_grad():
        for parameter in parameters.values():
            parameter.mul_(1.2).add_(0.01)
    expected = torch_logits(theirs)
    logits, gradients = logits_and_gradients(model, lora)
    assert_close(logits, expected, rtol=2e-5)
    assert_different(expected, base_logits)
    own = {
        f"base_model.model.{full}.lora_{letter}.weight": np.asarray(getattr(one.lora, f"lora_{letter}"))
        for _, full, _, one in layer_adapters(gradients)
        for letter in "AB"
    }
    assert_gradients_close(own, torch_gradients(theirs, parameters))
    save_adapter(tmp_path / "ours", lora)
    assert_close(torch_logits(from_pretrained(folder, tmp_path / "ours")), expected, rtol=2e-5)
    assert_close(model(IDS, lora=load_adapter(tmp_path / "ours", model)), expected, rtol=2e-5)
    config = json.loads((tmp_path / "ours" / "adapter_config.json").read_text())
    # Doubled, and with √r in the scale as much as leaves that alone.
    assert (config["r"], config["lora_alpha"]) == (6, pytest.approx(5 * 2**0.5 if initialiser == "pissa" else 10))
    assert config["init_lora_weights"] is True
    assert config["rank_pattern"] == ({"o_proj": 4} if initialiser == "olora" else {})

    # PEFT's own conversion to the base as it was; without it, the tensors are no update of that.
    theirs.save_pretrained(tmp_path / "unconverted")
    with pytest.raises(InputError, match="path_initial_model_for_weight_conversion"):
        load_adapter(tmp_path / "unconverted", model)
    theirs.save_pretrained(tmp_path / "theirs", path_initial_model_for_weight_conversion=str(tmp_path / "initial"))
    assert_close(model(IDS, lora=load_adapter(tmp_path / "theirs", model)), expected, rtol=2e-5)


def test_dora_on_a_bfloat16_base(bases, tmp_path):
    """No farther from PyTorch's bfloat16 than that is from float32 (root mean square)."""
    folder, _ = bases["untied"]
    theirs = torch_peft(folder, torch.bfloat16, use_dora=True, target_modules=EVERYTHING)
    theirs.save_pretrained(tmp_path)
    model = Phi3ForCausalLM.from_pretrained(str(folder), dtype=jnp.bfloat16)
    ours = np.asarray(model(IDS, lora=load_adapter(tmp_path, model)))
    reference = torch_logits(theirs)
    exact = torch_logits(from_pretrained(folder, tmp_path))
    noise = np.sqrt(np.mean((reference - exact) ** 2))
    assert np.sqrt(np.mean((ours - reference) ** 2)) < noise
    assert noise < 0.05 * np.sqrt(np.mean(exact**2))
