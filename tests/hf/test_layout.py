"""Which tensors a checkpoint has."""

import json
import re

import numpy as np
import pytest

from phi3_jax import Phi3Config
from phi3_jax.hf.layout import checkpoint_layout


class TestNames:
    @pytest.mark.parametrize(
        ("config", "shapes"),
        [("phi-3-mini-4k-instruct", "Phi3Mini4K"), ("phi-3-medium-128k-instruct", "Phi3Medium4K")],
    )
    def test_names_and_shapes_of_the_released_models(self, testdata, config, shapes):
        text = (testdata / "shapes" / f"{shapes}ShapeTest.approved.txt").read_text()
        rows = re.findall(r"^\d+: (\S+) shape: \[([\d, ]+)\]$", text, re.MULTILINE)
        expected = {name: tuple(map(int, shape.split(", "))) for name, shape in rows}
        layout = checkpoint_layout(Phi3Config.from_pretrained(testdata / "models" / config))
        assert {entry.name: entry.shape for entry in layout} == expected
        assert len(layout) == len(expected)

    def test_names_and_shapes_of_phi_4_mini(self, testdata):
        skeleton = json.loads((testdata / "shapes" / "phi-4-mini.weights_skeleton.json").read_text())
        raw = json.loads((testdata / "models" / "phi-4-mini-instruct" / "config.json").read_text())
        layout = checkpoint_layout(Phi3Config.from_dict(raw | {"num_hidden_layers": 1}))
        assert {entry.name: list(entry.shape) for entry in layout} == skeleton["tensors"]

    @pytest.mark.parametrize("name", ["phi-3-mini-4k-instruct", "phi-3.5-mini-instruct"])
    def test_names_and_bytes_of_the_released_index(self, testdata, name):
        released = testdata / "models" / name
        index = json.loads((released / "model.safetensors.index.json").read_text())
        layout = checkpoint_layout(Phi3Config.from_pretrained(released))
        assert {entry.name for entry in layout} == set(index["weight_map"])
        assert 2 * sum(int(np.prod(entry.shape)) for entry in layout) == index["metadata"]["total_size"]
