"""`Phi3ForCausalLM.from_pretrained` and `.save_pretrained`: from files to a model and back, as in transformers.

The class is the model's; these two are given to it here, since the model's room knows nothing of files.
"""

from collections.abc import Mapping
from functools import partial
from inspect import Parameter, signature
from pathlib import Path

from jax.sharding import Mesh

from phi3_jax.config.hub_options import Hub
from phi3_jax.hf.arguments import BnbObject, Dtype, named_dtype, pass_over, same, weights_kept
from phi3_jax.hf.checkpoint import Checkpoint
from phi3_jax.hf.save import save_model
from phi3_jax.model.phi3 import Phi3ForCausalLM
from phi3_jax.parallel.layout import weight_sharding
from phi3_jax.system.errors import InputError
from phi3_jax.system.reading import local_path
from phi3_jax.system.text import shown

__all__ = ["Phi3ForCausalLM"]


def from_pretrained(
    cls: type[Phi3ForCausalLM],
    /,
    path_or_hub_id: str | Path,
    *,
    dtype: Dtype | None = None,
    quantization: str | None = None,
    double_quant: bool | None = None,
    attention: str = "auto",
    mesh: Mesh | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    quantization_config: BnbObject | Mapping[str, object] | None = None,
    torch_dtype: Dtype | None = None,
    use_auth_token: str | bool | None = None,
    subfolder: str = "",
    **others: object,
) -> Phi3ForCausalLM:
    """Loads a Hugging Face checkpoint: a folder, or a hub id that is downloaded and cached.

    transformers' other arguments are either named in a printed line as passed over, such as `device_map` and
    `trust_remote_code`, since nothing depends on them here, or refused.

    Args:
        cls: The model's class.
        path_or_hub_id: Folder or hub id, as text or as a path.
        dtype: Of the weights in memory, and of all arithmetic with them: float32, bfloat16 (the default) or float16,
            as JAX's, NumPy's or PyTorch's type or its name; `auto` for what the checkpoint is stored in.
        quantization: `nf4` or `int8`: the decoder layers' linear weights are kept so, and the rest
            in `dtype`. A checkpoint that bitsandbytes has quantised is kept as it is in any case.
        double_quant: Quantise the statistics of NF4 too; default: true, and with `quantization_config` as that says.
        attention: The kernel, see `model.attention.attend`.
        mesh: Devices that share the weights (`parallel.mesh.make_mesh`), of which each host reads its
            own part; call the model within `jax.set_mesh(mesh)`. Default: one device has all.
        revision: Branch, tag or commit on the hub; default: the main branch.
        token: To log in to the hub with; default: the one stored here.
        cache_dir: Where downloads are kept; default: huggingface_hub's place.
        local_files_only: Never ask the network.
        quantization_config: transformers' `BitsAndBytesConfig`, or its dictionary, in place of `quantization`.
        torch_dtype: transformers' older name for `dtype`.
        use_auth_token: Its older name for `token`.
        subfolder: Of the folder.
        others: transformers' other arguments.

    Raises:
        InputError: With everything that is wrong with the checkpoint at once, and where two arguments contradict
            each other.
        TypeError: Naming the arguments that mean nothing here.

    Example:
        >>> import jax.numpy as jnp
        >>> import phi3_jax as p3
        >>> from phi3_jax.demo import demo_path
        >>> model = p3.Phi3ForCausalLM.from_pretrained(demo_path("base"), dtype=jnp.float32)
        >>> model(jnp.ones((1, 5), int)).shape == (1, 5, model.config.vocab_size)
        True
        >>> model = p3.Phi3ForCausalLM.from_pretrained(demo_path("base"), torch_dtype="auto", trust_remote_code=True)
        trust_remote_code=True is passed over: no code out of a checkpoint is ever run
        >>> model.dtype
        dtype('float16')
    """
    for name, value in (("double_quant", double_quant), ("local_files_only", local_files_only)):
        if not isinstance(value, bool | None):  # "no" would be true
            raise InputError(f"{name} is {shown(value)}, expected true or false")
    bits = ("load_in_4bit", "load_in_8bit")
    loading: dict[str, object] = {name: others.pop(name) for name in bits if name in others}
    if any(loading.values()):
        if quantization_config is not None:
            raise InputError(f"{next(iter(loading))} is given beside quantization_config; leave one of them out")
        quantization_config = loading
    pass_over("from_pretrained", others, OWN)
    if subfolder:
        path_or_hub_id = _within(path_or_hub_id, subfolder)
    given = same("dtype", _named(dtype), "torch_dtype", _named(torch_dtype))
    kept = weights_kept(given, quantization, double_quant, quantization_config)
    token = use_auth_token if token is None else token
    checkpoint = Checkpoint.open(path_or_hub_id, Hub(revision, token, cache_dir, local_files_only))
    return checkpoint.load_model(
        dtype=checkpoint.stored_dtype if kept.dtype == "auto" else kept.dtype,
        quantization=kept.quantization,
        double_quant=kept.double_quant,
        attention=attention,
        shardings=None if mesh is None else partial(weight_sharding, mesh=mesh),
    )


_PARAMETERS = signature(from_pretrained).parameters.values()
OWN = tuple(parameter.name for parameter in _PARAMETERS if parameter.kind is Parameter.KEYWORD_ONLY)


def _named(dtype: Dtype | None) -> str | None:
    return None if dtype is None else named_dtype(dtype)


def _within(path_or_hub_id: str | Path, subfolder: str) -> Path:
    """A folder in a folder. Raises `InputError` for a hub id, of which the top folder is downloaded."""
    folder = local_path(path_or_hub_id)
    if not folder.is_dir():
        raise InputError(
            f"subfolder is {subfolder}, and of {path_or_hub_id} only the top folder is read; give a local folder"
        )
    return folder / subfolder


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
