"""EVA against PEFT's `initialize_lora_eva_weights`: ranks, scales, and A."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

from phi3_jax import LoraConfig, Phi3ForCausalLM  # noqa: E402
from phi3_jax.lora import eva_init  # noqa: E402
from phi3_jax.lora.stack import unstacked  # noqa: E402
from phi3_jax.lora.targets import checkpoint_name  # noqa: E402
from tests.helpers.references import torch_phi3  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")

# Every layer's input is 32 wide, twice the components: there PEFT's randomised SVD is exact.
SIZES = {"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 32, "num_key_value_heads": 2}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    torch_phi3(folder, **SIZES)
    return folder, Phi3ForCausalLM.from_pretrained(str(folder), dtype=jnp.float32)


def batch(seed):
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, 99, (4, 24))
    mask = np.ones_like(ids)
    mask[0, 20:] = mask[2, 15:] = 0
    labels = np.where((mask == 1) & (rng.random(ids.shape) < 0.8), ids, -100)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def both(base, batches, **config):
    """(PEFT's model, our adapter), both over the batches again and again until all has converged."""
    folder, ours = base
    config = {"r": 8, "lora_alpha": 12, "target_modules": "all-linear", "init_lora_weights": "eva", **config}
    torch_base = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    theirs = config | {"eva_config": peft.EvaConfig(**config.get("eva_config", {}))}
    model = peft.get_peft_model(torch_base.eval(), peft.LoraConfig(**theirs, task_type="CAUSAL_LM"))
    loader = [{name: torch.tensor(array) for name, array in batch.items()} for batch in batches]
    peft.initialize_lora_eva_weights(model, loader, show_progress_bar=False)
    return model, eva_init(ours, LoraConfig(**config), itertools.cycle(batches), jax.random.key(0))


def assert_same_start(model, lora, atol):
    found = {}
    for name, adapter in lora.items():
        if name == "model.embed_tokens":
            continue
        layers = unstacked(adapter) if name.startswith("model.layers.") else [(None, adapter)]
        found |= {name if layer is None else checkpoint_name(name, layer): own for layer, own in layers}
    theirs = {
        name.removeprefix("base_model.model."): module
        for name, module in model.named_modules()
        if hasattr(module, "lora_A") and "default" in module.lora_A
    }
    assert found.keys() == theirs.keys()
    for name, own in found.items():
        layer = theirs[name]
        assert own.lora_A.shape == tuple(layer.lora_A["default"].weight.shape), name
        assert own.scaling == pytest.approx(layer.scaling["default"], rel=1e-12)
        assert lora.config.rank_and_alpha(name) == (layer.r["default"], pytest.approx(layer.lora_alpha["default"]))
        # Signs too: the largest entry of each row is positive.
        np.testing.assert_allclose(own.lora_A, layer.lora_A["default"].weight.detach().numpy(), atol=atol)
        assert not np.any(own.lora_B)
    return {name: own.rank for name, own in found.items()}


# 1.5e-5 and 1.1e-5 seen: float32's rounding, times the inverse of the gaps between singular values.
@pytest.mark.parametrize(
    "config",
    [
        {"target_modules": ["o_proj", "down_proj"]},
        {
            "target_modules": ["qkv_proj", "down_proj", "lm_head", "embed_tokens"],
            "r": 10,
            "use_rslora": True,
            "eva_config": {"whiten": True, "rho": 1.6, "adjust_scaling_factors": False, "use_label_mask": False},
        },
    ],
    ids=["defaults", "settings"],
)
def test_one_batch(base, config):
    model, lora = both(base, [batch(0)], **config)
    ranks = assert_same_start(model, lora, atol=5e-5)
    assert len(set(ranks.values())) > 1


def test_several_batches(base):
    """What a batch leaves of those before it is cut off at r · rho components, in both alike, so the
    tolerance is that of one batch, with the rounding of several (5.4e-5 seen)."""
    targets = ["o_proj", "down_proj"]
    model, lora = both(base, [batch(i) for i in range(4)], target_modules=targets, eva_config={"tau": 0.95})
    assert_same_start(model, lora, atol=2e-4)


@pytest.mark.slow
def test_randomised(base):
    """Fewer columns than inputs: both draw their own, and come near the same components (7e-4 seen)."""
    model, lora = both(base, [batch(0), batch(1)], r=4, rank_pattern={"qkv_proj": 3}, eva_config={"tau": 0.9})
    assert_same_start(model, lora, atol=5e-3)
