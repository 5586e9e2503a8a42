"""What trains and what is saved; equality with loralib's rules is in tests/parity."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import phi3_jax as p3
import phi3_jax.loralib as lora
from phi3_jax import InputError
from tests.helpers.models import filled


class Model(nnx.Module):
    def __init__(self, rngs):
        self.fc = lora.Linear(4, 6, r=2, lora_dropout=0.1, rngs=rngs)
        self.conv = nnx.Conv(6, 6, (3,), rngs=rngs)
        self.norm = nnx.BatchNorm(6, rngs=rngs)

    def __call__(self, x):
        return self.norm(self.conv(self.fc(x)))


@pytest.fixture
def model():
    return filled(lambda: Model(nnx.Rngs(0)))


def marked(model, bias):
    return {
        ".".join(path)
        for path, leaf in nnx.to_flat_state(lora.mark_only_lora_as_trainable(model, bias))
        if leaf.get_value()
    }


def test_the_mask_is_a_tree_for_the_whole_state(model):
    """Batch statistics and random states included, which never train."""
    mask, state = lora.mark_only_lora_as_trainable(model), nnx.state(model)
    assert jax.tree.structure(mask) == jax.tree.structure(jax.tree.map(lambda _: True, state))
    trainable, frozen = p3.partition(state, mask)
    assert len(jax.tree.leaves(trainable)) == 2
    combined = p3.combine(trainable, frozen)
    assert all(a is b for a, b in zip(jax.tree.leaves(combined), jax.tree.leaves(state), strict=True))
    adapter = {"fc.lora_A", "fc.lora_B"}
    assert marked(model, "none") == adapter
    assert marked(model, "lora_only") == adapter | {"fc.bias"}
    assert marked(model, "all") == adapter | {"fc.bias", "conv.bias", "norm.bias"}
    model.eval()  # a merged weight does not train
    assert marked(model, "none") == adapter


def test_freeze_takes_the_mask(model):
    parameter = (nnx.Param, lora.LoraParam)
    params = nnx.state(model, parameter)
    mask = nnx.filter_state(lora.mark_only_lora_as_trainable(model, "lora_only"), parameter)
    tx = p3.freeze(optax.sgd(1.0), mask)
    updates, _ = tx.update(jax.tree.map(jnp.ones_like, params), tx.init(params), params)
    changed = {".".join(path) for path, leaf in nnx.to_flat_state(updates) if np.any(leaf.get_value())}
    assert changed == {"fc.lora_A", "fc.lora_B", "fc.bias"}


def test_applied_adapters_count_as_loralibs_layers(model):
    adapted = lora.apply(model, lora.init(model, {"conv": lora.Config(2)}, jax.random.key(0)))
    assert marked(adapted, "lora_only") == {
        f"{layer}.{name}" for layer in ("fc", "conv") for name in ("lora_A", "lora_B", "bias")
    }
    assert set(lora.lora_state_dict(adapted, "lora_only")) == marked(adapted, "lora_only")
    assert "conv.lora_A" not in lora.lora_state_dict(model)


def test_there_and_back(model):
    saved = {name: np.asarray(array) + 1 for name, array in lora.lora_state_dict(model, "all").items()}
    other = filled(lambda: Model(nnx.Rngs(0)), seed=1)
    other.eval()
    x = jnp.ones((2, 5, 4))
    lora.load_lora_state_dict(other, saved, "all")
    found = lora.lora_state_dict(other, "all")
    assert found.keys() == saved.keys() == marked(model, "all")
    for name, array in found.items():
        np.testing.assert_array_equal(array, saved[name])
    # Loaded in evaluation mode, it is merged anew.
    merged = other.fc(x)
    other.train()
    lora.load_lora_state_dict(other, saved, "all")
    other.eval()
    np.testing.assert_array_equal(merged, other.fc(x))
    assert np.abs(merged - filled(lambda: Model(nnx.Rngs(0)), seed=1).fc(x)).max() > 0.1


def test_what_does_not_fit_is_refused_and_nothing_changed(model):
    state = lora.lora_state_dict(model, "lora_only")
    cases = [
        ({k: v for k, v in state.items() if k != "fc.lora_A"}, "missing fc.lora_A$"),
        ({**state, "fc2.lora_A": state["fc.lora_A"]}, "unknown fc2.lora_A$"),
        (
            {**state, "fc.lora_B": jnp.zeros((2, 6))},
            r"fc.lora_B has shape \[2, 6\] in the state and \[6, 2\] in the model",
        ),
        ({"a": jnp.zeros(1)}, "missing fc.bias, fc.lora_A, fc.lora_B; unknown a$"),
    ]
    for changed, message in cases:
        with pytest.raises(InputError, match=message) as error:
            lora.load_lora_state_dict(model, jax.tree.map(lambda leaf: leaf + 1, changed), "lora_only")
        assert "\n" not in str(error.value)
        for name, array in lora.lora_state_dict(model, "lora_only").items():
            np.testing.assert_array_equal(array, state[name])


@pytest.mark.parametrize(
    "call",
    [
        lora.mark_only_lora_as_trainable,
        lora.lora_state_dict,
        lambda model, bias: lora.load_lora_state_dict(model, {}, bias),
    ],
)
def test_an_unknown_bias_is_refused(model, call):
    with pytest.raises(InputError, match="bias is 'lora'; expected one of none, all, lora_only"):
        call(model, "lora")


def test_a_model_without_adapters_would_train_nothing():
    with pytest.raises(InputError, match="nothing would train: no parameter is named lora_"):
        lora.mark_only_lora_as_trainable(nnx.Linear(2, 3, rngs=nnx.Rngs(0)))
    with pytest.raises(InputError, match="nothing would train"):
        lora.mark_only_lora_as_trainable(lora.Linear(2, 3, use_bias=False, rngs=nnx.Rngs(0)), "lora_only")
