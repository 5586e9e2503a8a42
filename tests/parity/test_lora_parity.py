"""LoRA against the real PEFT: logits, gradients, files both ways, merging, matching."""

import json
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

from peft.tuners.tuners_utils import BaseTunerLayer  # noqa: E402

from phi3_jax import InputError, LoraConfig, Phi3ForCausalLM  # noqa: E402
from phi3_jax.lora import init_lora, match_targets, merge_lora, unmerge_lora  # noqa: E402
from phi3_jax.peft.adapter import load_adapter  # noqa: E402
from phi3_jax.peft.save import save_adapter  # noqa: E402
from tests.helpers.references import (  # noqa: E402  # noqa: E402
    EVERYTHING,
    IDS,
    SMALL,
    TINY,
    assert_close,
    assert_different,
    assert_near,
    torch_base,
    torch_logits,
    torch_phi3,
)

# PEFT warns of every targeted embedding, and that it looked for a base's config on the hub.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def base(request, tmp_path_factory):
    """(folder, our model) of a small random checkpoint."""
    folder = tmp_path_factory.mktemp("base")
    torch_phi3(folder, **SMALL, tie_word_embeddings=request.param)
    return folder, Phi3ForCausalLM.from_pretrained(str(folder), dtype=jnp.float32)


@pytest.fixture(scope="module")
def untied(tmp_path_factory):
    folder = tmp_path_factory.mktemp("untied")
    torch_phi3(folder, **SMALL)
    return folder, Phi3ForCausalLM.from_pretrained(str(folder), dtype=jnp.float32)


def torch_peft(folder, dtype=torch.float32, **config):
    """A PEFT model in evaluation mode whose A and B are all random, as after some training."""
    torch.manual_seed(1)
    settings = {"r": 3, "lora_alpha": 5, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **config}
    model = peft.get_peft_model(torch_base(folder, dtype), peft.LoraConfig(**settings)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.2)
    return model


def from_torch_peft(model, folder, ours):
    model.save_pretrained(folder)
    return load_adapter(folder, ours)


def peft_tensors(lora):
    """PEFT's parameter names of one adapter's, or one gradient's, arrays."""
    tensors = {}
    for name, adapter in lora.items():
        for letter, array in (("A", adapter.lora_A), ("B", adapter.lora_B)):
            if name == "model.embed_tokens":
                tensors[f"{name}.lora_embedding_{letter}.default"] = array
            elif name == "lm_head":
                tensors[f"{name}.lora_{letter}.default.weight"] = array
            else:
                tail = name.removeprefix("model.layers.")
                for i, layer in enumerate(array):
                    tensors[f"model.layers.{i}.{tail}.lora_{letter}.default.weight"] = layer
    return {f"base_model.model.{name}": np.asarray(array) for name, array in tensors.items()}


VARIANTS = {
    "all-linear": {},
    "rslora": {"use_rslora": True},
    "fractional alpha": {"lora_alpha": 2.5},
    "attention only": {"target_modules": ["qkv_proj", "o_proj"]},
    "regex": {"target_modules": r".*\.layers\.\d\.mlp\..*_proj"},
    "lm_head": {"target_modules": ["lm_head"]},
    "embed_tokens": {"target_modules": ["embed_tokens"]},
    "everything": {"target_modules": EVERYTHING, "use_rslora": True, "lora_dropout": 0.3},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_peft_to_ours(base, tmp_path, variant):
    folder, ours = base
    theirs = torch_peft(folder, **VARIANTS[variant])
    lora = from_torch_peft(theirs, tmp_path, ours)
    logits = ours(IDS, lora=lora)
    assert_close(logits, torch_logits(theirs))
    assert_different(logits, ours(IDS))
    names = {name for name, _ in theirs.named_parameters() if "lora_" in name}
    assert set(peft_tensors(lora)) == names


@pytest.mark.parametrize("variant", VARIANTS)
def test_ours_to_peft(base, tmp_path, variant):
    folder, ours = base
    config = LoraConfig(**{"r": 3, "lora_alpha": 5, "init_lora_weights": False, **VARIANTS[variant]})
    lora = init_lora(ours, config, jax.random.key(3))
    save_adapter(tmp_path / "adapter", lora)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*missing adapter keys.*")
        theirs = peft.PeftModel.from_pretrained(torch_base(folder), tmp_path / "adapter").eval()
    logits = torch_logits(theirs)
    assert_close(ours(IDS, lora=lora), logits)
    assert_different(logits, torch_logits(torch_base(folder)))
    # Bit for bit, and exactly the same modules.
    parameters = {name: p.detach().numpy() for name, p in theirs.named_parameters() if "lora_" in name}
    tensors = peft_tensors(lora)
    assert parameters.keys() == tensors.keys()
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(parameters[name], tensor)


def test_left_padding(untied, tmp_path):
    folder, ours = untied
    theirs = torch_peft(folder, target_modules=EVERYTHING)
    lora = from_torch_peft(theirs, tmp_path, ours)
    mask = np.ones_like(IDS)
    mask[0, :3] = 0
    positions = np.maximum(np.cumsum(mask, axis=1) - 1, 0)
    logits = torch_logits(theirs, attention_mask=torch.tensor(mask), position_ids=torch.tensor(positions))
    real = mask.astype(bool)
    assert_close(np.asarray(ours(IDS, attention_mask=mask, lora=lora))[real], logits[real])


@pytest.mark.parametrize("variant", ["all-linear", "everything"])
def test_gradients(base, tmp_path, variant):
    """Of the mean cross-entropy, with respect to every A and B; the ids include the padding token."""
    folder, ours = base
    theirs = torch_peft(folder, **{**VARIANTS[variant], "lora_dropout": 0.0})
    lora = from_torch_peft(theirs, tmp_path, ours)

    def loss(lora):
        logits = jax.nn.log_softmax(ours(IDS, lora=lora)[:, :-1])
        return -jnp.mean(jnp.take_along_axis(logits, jnp.asarray(IDS)[:, 1:, None], axis=-1))

    value, grads = jax.value_and_grad(loss)(lora)
    logits = theirs(torch.tensor(IDS), use_cache=False).logits[:, :-1]
    reference = torch.nn.functional.cross_entropy(
        logits.reshape(-1, logits.shape[-1]), torch.tensor(IDS[:, 1:]).ravel()
    )
    reference.backward()
    assert float(value) == pytest.approx(reference.item(), rel=1e-6)
    expected = {name: p.grad.numpy() for name, p in theirs.named_parameters() if "lora_" in name}
    tensors = peft_tensors(grads)
    assert tensors.keys() == expected.keys()
    for name, tensor in tensors.items():
        assert np.abs(expected[name]).max() > 0, name
        assert_near(tensor, expected[name])


def test_bfloat16_base_with_float32_adapters(untied, tmp_path):
    """About as near to the truth, float32, as PEFT's bfloat16 is (root mean square)."""
    folder, _ = untied
    theirs = torch_peft(folder, torch.bfloat16, target_modules=EVERYTHING)
    adapters = [p for name, p in theirs.named_parameters() if "lora_" in name]
    assert {p.dtype for p in adapters} == {torch.float32}
    ours = Phi3ForCausalLM.from_pretrained(str(folder), dtype=jnp.bfloat16)
    lora = from_torch_peft(theirs, tmp_path, ours)
    reference = torch_logits(theirs)
    exact = torch_logits(peft.PeftModel.from_pretrained(torch_base(folder), tmp_path).eval())
    noise = np.sqrt(np.mean((reference - exact) ** 2))
    error = np.sqrt(np.mean((np.asarray(ours(IDS, lora=lora)) - exact) ** 2))
    # PEFT multiplies by A and B in float32 here, we by A and B in bfloat16, as it does itself under
    # autocast. The adapters are random, as large as they never are after training.
    assert error < 1.25 * noise
    assert noise < 0.05 * np.sqrt(np.mean(exact**2))


@pytest.mark.parametrize("file_dtype", [torch.float16, torch.bfloat16])
def test_adapters_saved_in_half_precision_are_float32_in_memory(untied, tmp_path, file_dtype):
    folder, ours = untied
    theirs = torch_peft(folder)
    for name, parameter in theirs.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(file_dtype)
    lora = from_torch_peft(theirs, tmp_path, ours)
    assert {leaf.dtype for leaf in jax.tree.leaves(lora)} == {jnp.dtype(jnp.float32)}
    parameters = dict(theirs.named_parameters())
    for name, tensor in peft_tensors(lora).items():
        np.testing.assert_array_equal(tensor, parameters[name].detach().float().numpy())


@pytest.mark.parametrize("variant", ["all-linear", "everything"])
def test_merged_weights_are_those_of_merge_and_unload(untied, tmp_path, variant):
    folder, ours = untied
    theirs = torch_peft(folder, **VARIANTS[variant])
    lora = from_torch_peft(theirs, tmp_path / "adapter", ours)
    adapted = torch_logits(theirs)
    merged = merge_lora(ours, lora)
    merged.save_pretrained(str(tmp_path / "merged"))
    expected = theirs.merge_and_unload().state_dict()
    loaded = torch_base(tmp_path / "merged")
    assert loaded.state_dict().keys() == expected.keys()
    for name, weight in loaded.state_dict().items():
        # The same product and sum; their last bits differ.
        np.testing.assert_allclose(weight.numpy(), expected[name].numpy(), rtol=1e-6, atol=1e-6)
    assert_close(torch_logits(loaded), adapted)
    assert_close(merged(IDS), adapted)
    # Taken out again: the rounding of the merged weights, whose updates are larger than the base, stays.
    assert_close(unmerge_lora(merged, lora)(IDS), torch_logits(torch_base(folder)), rtol=1e-4)


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
def test_a_merged_tied_model_loads_untied_in_transformers(tmp_path, target):
    torch_phi3(tmp_path / "base", **SMALL, tie_word_embeddings=True)
    ours = Phi3ForCausalLM.from_pretrained(str(tmp_path / "base"), dtype=jnp.float32)
    theirs = torch_peft(tmp_path / "base", target_modules=[target])
    lora = from_torch_peft(theirs, tmp_path / "adapter", ours)
    merge_lora(ours, lora).save_pretrained(str(tmp_path / "merged"))
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["tie_word_embeddings"] is False
    assert_close(torch_logits(torch_base(tmp_path / "merged")), torch_logits(theirs))


@pytest.mark.slow
@pytest.mark.parametrize(
    "given",
    [
        {"target_modules": ["qkv_proj", "embed_tokens"]},
        {"target_modules": ["qkv_proj", "lm_head"]},
        {"target_modules": ["qkv_proj"], "modules_to_save": ["embed_tokens"]},
        {"target_modules": ["qkv_proj"], "trainable_token_indices": [3, 5]},
        {"target_modules": ["qkv_proj", "lm_head"], "bias": "all"},
    ],
)
def test_what_peft_ties_to_the_other_end_of_the_model(base, tmp_path, given):
    folder, ours = base
    theirs = torch_peft(folder, **{"ensure_weight_tying": True, **given})
    lora = from_torch_peft(theirs, tmp_path / "adapter", ours)
    assert_close(ours(IDS, lora=lora), torch_logits(theirs))


TARGETS = [
    "all-linear",
    "ALL-LINEAR",
    ["qkv_proj"],
    ["self_attn.o_proj", "lm_head"],
    ["embed_tokens", "mlp.down_proj"],
    r".*_proj",
    r"lm_head|.*embed_tokens",
    r"model\.layers\.\d+\.self_attn\.(qkv|o)_proj",
    r"(?!.*mlp).*_proj",
    [f"model.layers.{i}.mlp.gate_up_proj" for i in range(3)],
    # PEFT refuses these; so do we.
    "qkv_proj",
    ["norm"],
    ["mlp"],
    r".*self_attn.*",
    r"model\.layers\.\d+\.nothing",
]


@pytest.mark.parametrize("targets", TARGETS, ids=str)
def test_the_same_modules_as_peft(base, targets):
    folder, ours = base
    config = peft.LoraConfig(target_modules=targets, task_type="CAUSAL_LM")
    try:
        adapted = peft.get_peft_model(torch_base(folder), config)
    except ValueError:
        with pytest.raises(InputError):
            match_targets(ours, targets)
        return
    expected = {name for name, module in adapted.named_modules() if isinstance(module, BaseTunerLayer)}
    names = {f"base_model.model.{name}" for module in match_targets(ours, targets) for name in module.names}
    assert names == expected


def test_names_of_slices_where_peft_is_silent(untied):
    """The Llama names: PEFT adapts two modules of four and says nothing; here all seven are what was meant."""
    folder, ours = untied
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    adapted = peft.get_peft_model(torch_base(folder), peft.LoraConfig(target_modules=targets))
    assert sum(isinstance(module, BaseTunerLayer) for module in adapted.modules()) == 2 * TINY["num_hidden_layers"]
    assert sorted(module.suffix for module in match_targets(ours, targets)) == sorted(targets)
    with pytest.raises(ValueError, match="not found"):
        peft.get_peft_model(torch_base(folder), peft.LoraConfig(target_modules=["q_proj"]))
    assert [module.shape for module in match_targets(ours, ["q_proj", "k_proj"])] == [(64, 64), (32, 64)]


def test_auto_peft_model_finds_the_base(untied, tmp_path):
    folder, ours = untied
    lora = init_lora(ours, LoraConfig(r=2, init_lora_weights=False), jax.random.key(0))
    save_adapter(tmp_path, lora, base_model_name_or_path=str(folder))
    loaded = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    assert_close(ours(IDS, lora=lora), torch_logits(loaded))
    assert load_adapter(tmp_path, ours).config.base_model_name_or_path == str(folder)


def test_starts_are_drawn_from_pefts_distributions(untied):
    """Standard deviations of each kind of start; 5% is many times their sampling error."""
    folder, ours = untied
    for start in (True, "gaussian", False, "orthogonal"):
        targets = EVERYTHING if start != "orthogonal" else [name for name in EVERYTHING if name != "embed_tokens"]
        settings = {"r": 64, "init_lora_weights": start, "target_modules": targets}
        torch.manual_seed(0)
        theirs = peft.get_peft_model(torch_base(folder), peft.LoraConfig(**settings, task_type="CAUSAL_LM"))
        expected = {n: p.detach().numpy() for n, p in theirs.named_parameters() if "lora_" in n}
        drawn = peft_tensors(init_lora(ours, LoraConfig(**settings), jax.random.key(0)))
        assert drawn.keys() == expected.keys()
        for name, tensor in drawn.items():
            assert tensor.std() == pytest.approx(expected[name].std(), rel=0.05), (start, name)
            assert np.abs(tensor).max() == pytest.approx(np.abs(expected[name]).max(), rel=0.25), (start, name)


def test_changed_embeddings_in_a_peft_file_are_refused(untied, tmp_path):
    """PEFT saves the tables of targeted embeddings along; what it did to them must not be lost."""
    folder, ours = untied
    theirs = torch_peft(folder, target_modules=["lm_head"])
    with torch.no_grad():
        theirs.get_output_embeddings().weight[3, 4] += 1
    theirs.save_pretrained(tmp_path)
    with pytest.raises(InputError, match="not the base's, though modules_to_save does not name them .*lm_head"):
        load_adapter(tmp_path, ours)


def test_a_pissa_adapter_is_refused_since_its_base_has_changed(untied, tmp_path):
    folder, ours = untied
    theirs = torch_peft(folder, init_lora_weights="pissa")
    theirs.save_pretrained(tmp_path)
    with pytest.raises(InputError, match="init_lora_weights"):
        load_adapter(tmp_path, ours)
