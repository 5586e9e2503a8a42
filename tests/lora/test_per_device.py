"""Adapters with a copy for each device: the same values and gradients, and nothing sent while layers are at work."""

import json
import os
import subprocess
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from phi3_jax.lora.per_device import Shares, per_device, spread, summed
from tests.helpers.models import random_lora, tiny_model

SHARES = Shares(2, 2, (), ())  # as devices would cut rows and positions
NAME = "model.layers.self_attn.qkv_proj"
KINDS = {
    "plain": {"lora_dropout": 0.3},
    "dora, by layer": {"use_dora": True, "lora_dropout": 0.3, "layers_to_transform": [0]},
}


@pytest.mark.parametrize("kind", KINDS)
def test_copies_give_what_the_adapter_gives(kind):
    model = tiny_model()
    lora = random_lora(model, target_modules=["qkv_proj"], **KINDS[kind])
    rng = np.random.default_rng(0)
    y, x, pull = (jnp.asarray(rng.normal(size=(4, 6, width)), jnp.float32) for width in (64, 32, 64))
    weight, key = model.model.layers.self_attn.qkv_proj.weight[...][0], jax.random.key(0)

    def first_layer(adapter):
        return jax.tree.map(lambda leaf: leaf[0], adapter)

    def alone(lora):
        adapter = first_layer(lora.materialise()["model"]["layers"]["self_attn"]["qkv_proj"])
        return adapter(y, x, weight, key), adapter.part(slice(8, 40))(y[..., 8:40], x, weight[8:40], key)

    def shared(lora):
        adapter = first_layer(dict(per_device(lora, SHARES).items())[NAME])
        return adapter(y, x, weight, key), adapter.part(slice(8, 40))(y[..., 8:40], x, weight[8:40], key)

    @partial(jax.jit, static_argnums=0)
    def pulled(function, lora):
        result, back = jax.vjp(function, lora)
        return result, back((pull, pull[..., 8:40]))[0]

    (expected, gradients), (actual, own) = pulled(alone, lora), pulled(shared, spread(lora, SHARES))
    for a, b in zip(jax.tree.leaves((actual, summed(own))), jax.tree.leaves((expected, gradients)), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-5 * float(jnp.abs(b).max()))
    assert any(float(jnp.abs(leaf).max()) > 0 for leaf in jax.tree.leaves(gradients))


def steps(meshes, kinds):
    """What `tests.helpers.mesh_steps` says of each kind on each mesh of 8 simulated devices, held against one."""
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "tests.helpers.mesh_steps", json.dumps([[1, 1, 1, 1], *meshes]), json.dumps(kinds)]
    run = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **flags}, check=False)
    assert run.returncode == 0, run.stderr
    return [json.loads(line) for line in run.stdout.splitlines() if line.startswith("{")]


MESHES = [[8, 1, 1, 1], [1, 8, 1, 1], [1, 1, 1, 8], [2, 2, 1, 2], [2, 2, 2, 1], [1, 2, 2, 2]]


@pytest.mark.slow
def test_a_step_sums_each_array_of_an_adapter_once():
    """Over all layers and both of its micro-batches."""
    found = steps(MESHES, {"plain": {"target_modules": "all-linear", "lora_dropout": 0.2}})
    assert len(found) == len(MESHES)
    for row in found:
        assert row["loss"] < 1e-6, row
        # Sums in another order: where gradients were still summed in every layer these were 8e-6 and 7e-5.
        assert row["grad_norm"] < 3e-5, row
        assert row["parameters"] < 2e-4, row
        tensor = row["mesh"][2]
        # Over `tensor` what is sent is the narrow sums of activations.
        assert tensor > 1 or row["in_layers"] == 0, row
        # Once over those that share rows, once over those that share positions.
        ways = (row["mesh"][0] * row["mesh"][1] > 1) + (row["mesh"][3] > 1)
        assert row["arrays_summed"] <= 8 * ways, row


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind",
    [
        {"target_modules": "all-linear", "use_dora": True},
        {"target_modules": "all-linear", "init_lora_weights": "pissa", "lora_dropout": 0.1},
        {"target_modules": ["embed_tokens", "lm_head", "down_proj"]},
        {"target_modules": ["q_proj", "v_proj", "up_proj"], "modules_to_save": ["o_proj"]},
        {"target_modules": "all-linear", "use_dora": True, "rank_pattern": {"layers.1.mlp.down_proj": 2}},
    ],
    ids=["dora", "pissa", "tables", "parts and a saved module", "by layer"],
)
def test_every_kind_of_adapter_trains_as_on_one_device(kind):
    for row in steps([[2, 2, 1, 2], [1, 2, 2, 2]], {"kind": kind}):
        assert row["loss"] < 1e-6, row
        assert row["grad_norm"] < 3e-5, row
        assert row["parameters"] < 2e-4, row
