"""Stacks of layers made on the devices: the same as those made on the host."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from phi3_jax import InputError
from phi3_jax.hf import load, stacking
from phi3_jax.hf.checkpoint import Checkpoint
from phi3_jax.parallel.layout import weight_sharding
from phi3_jax.parallel.mesh import make_mesh
from tests.helpers.checkpoints import model_of
from tests.helpers.models import QUANTIZABLE
from tests.helpers.shards import edit_shard


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stacking") / "base"
    model_of(QUANTIZABLE).save_pretrained(str(folder))
    return folder


@pytest.mark.parametrize("axes", [None, {"fsdp": 2, "tensor": 2, "data": 2}])
@pytest.mark.parametrize("options", [{}, {"quantization": "nf4"}, {"quantization": "int8"}, {"split": True}])
def test_layers_that_are_sent_one_by_one_make_the_same_model(folder, axes, options, monkeypatch):
    if axes is not None and jax.device_count() < 8:
        pytest.skip("needs 8 devices")
    monkeypatch.setattr(stacking, "READ_AHEAD", 2)
    monkeypatch.setattr(stacking, "SENT", 1)
    where = None if axes is None else partial(weight_sharding, mesh=make_mesh(axes, jax.devices()[:8]))
    models = []
    for by_layers in (False, True):
        monkeypatch.setattr(load, "is_by_layers", lambda _, by_layers=by_layers: by_layers)
        models.append(Checkpoint.open(folder).load_model(dtype=jnp.bfloat16, shardings=where, **options))
    whole, by_layer = map(jax.tree.leaves, models)
    assert jax.tree.structure(models[0]) == jax.tree.structure(models[1])
    for one, other in zip(whole, by_layer, strict=True):
        assert other.sharding == one.sharding
        np.testing.assert_array_equal(np.asarray(one).view(np.uint8), np.asarray(other).view(np.uint8))


def test_a_fault_names_its_tensor(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(load, "is_by_layers", lambda _: True)
    model_of(QUANTIZABLE).save_pretrained(str(tmp_path / "base"))
    name = "model.layers.1.self_attn.o_proj.weight"
    edit_shard(next((tmp_path / "base").glob("*.safetensors")), lambda tensors: tensors[name].fill(np.inf))
    with pytest.raises(InputError, match=name):
        Checkpoint.open(tmp_path / "base").load_model(dtype=jnp.bfloat16)


def test_cpus_take_over_the_hosts_memory():
    assert not stacking.is_by_layers(None) or jax.default_backend() != "cpu"
    mesh = make_mesh({"data": 1}, jax.devices()[:1])
    where = weight_sharding(("layers", "down_proj"), (2, 4, 4), mesh)
    assert stacking.shares(where) == 1
    assert stacking.divided(where, (2, 4, 4)) == where
