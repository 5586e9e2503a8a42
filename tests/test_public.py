"""The public names, and the README's own lines."""

import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import phi3_jax as p3
from tests.helpers.models import CONFIG

README = Path(__file__).parents[1] / "README.md"


def test_every_public_name_is_there_and_none_is_a_module() -> None:
    import phi3_jax.training.loop  # noqa: F401

    assert sorted(p3._MODULE_OF) == sorted(p3.__all__) == dir(p3)
    for name in p3.__all__:
        assert callable(getattr(p3, name)), name


def test_importing_the_package_does_not_load_jax() -> None:
    code = "import sys, phi3_jax, phi3_jax.cli; raise SystemExit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_readmes_python(tmp_path: Path) -> None:
    p3.Phi3ForCausalLM(CONFIG, rngs=nnx.Rngs(0)).save_pretrained(str(tmp_path / "base"))
    (code,) = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    code = code.replace("microsoft/Phi-3-mini-4k-instruct", str(tmp_path / "base"))
    code = code.replace('"out/', f'"{tmp_path}/out/').replace("max_new_tokens=64", "max_new_tokens=3")
    ids = jnp.arange(1, 13).reshape(2, 6)
    names: dict = {"input_ids": ids, "batch": {"input_ids": ids}}
    exec(code, names)
    assert names["logits"].shape == (2, 6, CONFIG.vocab_size)
    assert names["logits"].dtype == jnp.float32
    assert jax.tree.structure(names["grads"]) == jax.tree.structure(names["lora"])
    assert any(np.any(grad) for grad in jax.tree.leaves(names["grads"]))
    assert names["tokens"].shape == (2, 9)
    assert (tmp_path / "out" / "adapter" / "adapter_config.json").is_file()
    assert (tmp_path / "out" / "merged" / "model.safetensors").is_file()
