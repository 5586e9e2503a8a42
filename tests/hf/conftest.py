"""What the tests of this folder share."""

import json
from pathlib import Path

import pytest
from safetensors.numpy import save_file

from phi3_jax import Phi3Config
from tests.helpers.checkpoints import RAW
from tests.helpers.shards import tensors_of


@pytest.fixture
def folder(tmp_path) -> Path:
    """A checkpoint in two shards, written without this package: config.json, index, shards."""
    tensors = tensors_of(Phi3Config.from_dict(RAW))
    names = list(tensors)
    parts = {"model-00001-of-00002.safetensors": names[:9], "model-00002-of-00002.safetensors": names[9:]}
    for file, part in parts.items():
        save_file({name: tensors[name] for name in part}, tmp_path / file)
    index = {"metadata": {}, "weight_map": {name: file for file, part in parts.items() for name in part}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / "config.json").write_text(json.dumps(RAW))
    return tmp_path
