"""A checkpoint in two files, to spoil."""

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import save_file

from phi3_jax import InputError, Phi3Config, Phi3ForCausalLM
from phi3_jax.hf.checkpoint import Checkpoint
from phi3_jax.hf.layout import checkpoint_layout


def bits(model: Phi3ForCausalLM) -> dict[str, bytes]:
    return {
        "/".join(map(str, path)): np.asarray(leaf[...]).tobytes() for path, leaf in nnx.to_flat_state(nnx.state(model))
    }


def tensors_of(config: Phi3Config, dtype=np.float32) -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    return {entry.name: random.normal(size=entry.shape).astype(dtype) for entry in checkpoint_layout(config)}


def edit_index(folder: Path, change) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index["weight_map"])
    path.write_text(json.dumps(index))


def edit_shard(file: Path, change) -> None:
    with safe_open(file, "np") as opened:
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    change(tensors)
    save_file(tensors, file)


def failure(folder: Path) -> str:
    with pytest.raises(InputError) as caught:
        Checkpoint.open(folder).load_model(dtype=jnp.float32)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 4000
    return message


FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def cut(size: int):
    return st.tuples(st.integers(0, size), st.integers(0, size)).map(lambda ends: slice(*sorted(ends)))
