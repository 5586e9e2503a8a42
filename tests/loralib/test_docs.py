"""The code in docs/loralib.md runs as it stands."""

import os
import re
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from flax import nnx

PAGE = Path(__file__).parents[2] / "docs" / "loralib.md"


def test_the_code_of_the_page(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first, second = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 8)).astype(np.float32))
    model = nnx.MultiHeadAttention(2, 8, decode=False, rngs=nnx.Rngs(0))
    names: dict = {
        "model": model,
        "batches": [x, -x],
        "loss": lambda model, batch: jnp.mean(jnp.square(model(batch) - 1)),
    }

    exec(first, names)
    adapted, merged = names["adapted"](x), names["merged"](x)
    np.testing.assert_allclose(adapted, merged, rtol=1e-4, atol=1e-5)
    assert np.abs(adapted - model(x)).max() > 1e-4  # it has trained
    assert set(names["adapters"]) == {"query", "value"}
    assert (tmp_path / "lora.safetensors").is_file()

    names["batch"] = jnp.arange(12).reshape(2, 6)
    exec(second, names)
    found = {name for name, array in names["load_file"]("lora.safetensors").items() if array.size}
    layers = ("embed", "qkv", "out")
    expected = {f"{layer}.lora_{letter}" for layer in layers for letter in "AB"} | {"qkv.bias", "out.bias"}
    assert found == expected
    paths = {
        ".".join(map(str, path)) for path, grad in nnx.to_flat_state(names["grads"]) if grad.get_value() is not None
    }
    assert paths == expected
    assert names["model"].out.merged
    assert os.listdir(tmp_path) == ["lora.safetensors"]
