"""`Phi3ForCausalLM.from_pretrained` and `.save_pretrained`: from files to a model and back, as in transformers."""

from functools import partial
from typing import Any

import jax.numpy as jnp
from jax.sharding import Mesh

from phi3_jax.hf.checkpoint import load_model, save_model
from phi3_jax.model.phi3 import Phi3ForCausalLM
from phi3_jax.parallel.layout import weight_sharding

__all__ = ["Phi3ForCausalLM"]


def from_pretrained(
    cls: type[Phi3ForCausalLM],
    path_or_hub_id: str,
    *,
    dtype: Any = jnp.bfloat16,
    quantization: str | None = None,
    double_quant: bool = True,
    attention: str = "auto",
    mesh: Mesh | None = None,
    revision: str | None = None,
    token: str | None = None,
    cache_dir: str | None = None,
    local_files_only: bool = False,
) -> Phi3ForCausalLM:
    """Loads a Hugging Face checkpoint: a folder, or a hub id that is downloaded and cached.

    **Arguments**
    - `dtype`: of the weights in memory, and of all arithmetic with them.
    - `quantization`: `nf4` or `int8`: the decoder layers' linear weights are kept so, and the rest
      in `dtype`. A checkpoint that bitsandbytes has quantised is kept as it is in any case.
    - `double_quant`: that the statistics of NF4 are quantised too.
    - `attention`: the kernel, see `model.attention.attend`.
    - `mesh`: devices that share the weights (`parallel.mesh.make_mesh`), of which each host reads its
      own part; call the model within `jax.set_mesh(mesh)`. Default: one device has all.
    - `revision`, `token`, `cache_dir`, `local_files_only`: as in huggingface_hub.

    Raises `InputError` with everything that is wrong with the checkpoint at once.
    """
    return load_model(
        path_or_hub_id,
        dtype=dtype,
        quantization=quantization,
        double_quant=double_quant,
        attention=attention,
        shardings=None if mesh is None else partial(weight_sharding, mesh=mesh),
        revision=revision,
        token=token,
        cache_dir=cache_dir,
        local_files_only=local_files_only,
    )


def save_pretrained(self: Phi3ForCausalLM, folder: str, *, max_shard_size: int = 5 * 10**9) -> None:
    """Writes config.json and safetensors shards that transformers loads, bit for bit."""
    save_model(self, folder, max_shard_size=max_shard_size)


# Through setattr: to a type checker these are attributes that a class only reads.
setattr(Phi3ForCausalLM, "from_pretrained", classmethod(from_pretrained))  # noqa: B010
setattr(Phi3ForCausalLM, "save_pretrained", save_pretrained)  # noqa: B010
