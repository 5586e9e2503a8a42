"""`Phi3ForCausalLM.from_pretrained` and `.save_pretrained`: from files to a model and back, as in transformers.

The class is the model's; these two are given to it here, since the model's room knows nothing of files.
"""

from functools import partial
from pathlib import Path

import jax.numpy as jnp
from jax.sharding import Mesh
from jax.typing import DTypeLike

from phi3_jax.config.hub_options import Hub
from phi3_jax.hf.checkpoint import Checkpoint
from phi3_jax.hf.save import save_model
from phi3_jax.model.phi3 import Phi3ForCausalLM
from phi3_jax.parallel.layout import weight_sharding

__all__ = ["Phi3ForCausalLM"]


def from_pretrained(
    cls: type[Phi3ForCausalLM],
    path_or_hub_id: str | Path,
    *,
    dtype: DTypeLike = jnp.bfloat16,
    quantization: str | None = None,
    double_quant: bool = True,
    attention: str = "auto",
    mesh: Mesh | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
) -> Phi3ForCausalLM:
    """Loads a Hugging Face checkpoint: a folder, or a hub id that is downloaded and cached.

    Args:
        cls: The model's class.
        path_or_hub_id: Folder or hub id, as text or as a path.
        dtype: Of the weights in memory, and of all arithmetic with them: float32, bfloat16 or float16.
        quantization: `nf4` or `int8`: the decoder layers' linear weights are kept so, and the rest
            in `dtype`. A checkpoint that bitsandbytes has quantised is kept as it is in any case.
        double_quant: Quantise the statistics of NF4 too.
        attention: The kernel, see `model.attention.attend`.
        mesh: Devices that share the weights (`parallel.mesh.make_mesh`), of which each host reads its
            own part; call the model within `jax.set_mesh(mesh)`. Default: one device has all.
        revision: Branch, tag or commit on the hub; default: the main branch.
        token: To log in to the hub with; default: the one stored here.
        cache_dir: Where downloads are kept; default: huggingface_hub's place.
        local_files_only: Never ask the network.

    Raises:
        InputError: With everything that is wrong with the checkpoint at once.

    Example:
        >>> import jax.numpy as jnp
        >>> import phi3_jax as p3
        >>> from phi3_jax.demo import demo_path
        >>> model = p3.Phi3ForCausalLM.from_pretrained(demo_path("base"), dtype=jnp.float32)
        >>> model(jnp.ones((1, 5), int)).shape == (1, 5, model.config.vocab_size)
        True
    """
    checkpoint = Checkpoint.open(path_or_hub_id, Hub(revision, token, cache_dir, local_files_only))
    return checkpoint.load_model(
        dtype=dtype,
        quantization=quantization,
        double_quant=double_quant,
        attention=attention,
        shardings=None if mesh is None else partial(weight_sharding, mesh=mesh),
    )


def save_pretrained(self: Phi3ForCausalLM, folder: str | Path, *, max_shard_size: int = 5 * 10**9) -> None:
    """Writes config.json and safetensors shards that transformers loads, bit for bit.

    Args:
        self: The model.
        folder: Where to; an earlier checkpoint there is replaced.
        max_shard_size: Bytes of a file at most.

    Raises:
        InputError: Where the folder holds something else that would be in the way.
        StorageError: Where it cannot be written.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> import phi3_jax as p3
        >>> from flax import nnx
        >>> config = p3.Phi3Config(
        ...     vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        ...     num_key_value_heads=2, head_dim=8, max_position_embeddings=32, pad_token_id=None,
        ... )
        >>> folder = Path(tempfile.mkdtemp())
        >>> p3.Phi3ForCausalLM(config, rngs=nnx.Rngs(0)).save_pretrained(folder)
        >>> sorted(file.name for file in folder.iterdir())
        ['config.json', 'model.safetensors']
    """
    save_model(self, folder, max_shard_size=max_shard_size)


# Through setattr: to a type checker these are attributes that a class only reads.
setattr(Phi3ForCausalLM, "from_pretrained", classmethod(from_pretrained))  # noqa: B010
setattr(Phi3ForCausalLM, "save_pretrained", save_pretrained)  # noqa: B010
