"""Who sees whom, and scaled dot-product attention by whichever kernel suits the device and the shape."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int, PyTree

from phi3_jax.model.blocks import SPLASH_BLOCK
from phi3_jax.model.flash import flash_attention, visible
from phi3_jax.parallel.mesh import ambient_mesh, is_before_ampere, platform
from phi3_jax.parallel.sharding import RULES, check_tensor_axis
from phi3_jax.system.errors import InputError

KINDS = ("auto", "xla", "cudnn", "splash", "chunked")

# Up to here the whole square is one block for `chunked` too, and its loops only cost compile time.
_XLA_LENGTH = 128
# cuDNN takes the mask as an array of every pair of positions.
_CUDNN_LENGTH = 8192


def attend(
    q: Float[Array, "batch seq heads head_dim"],
    k: Float[Array, "batch seq kv_heads head_dim"],
    v: Float[Array, "batch seq kv_heads head_dim"],
    segment_ids: Int[Array, "batch seq"],
    *,
    sliding_window: int | None,
    kind: str = "auto",
) -> Float[Array, "batch seq heads head_dim"]:
    """softmax(q kᵀ / √head_dim) v over the keys that `visible` says.

    Scores and softmax are in float32, each kv head is shared by its group. Under a mesh
    (`jax.set_mesh`) rows lie over `data` and `fsdp`, heads over `tensor` and positions over `context`;
    each device gathers the keys and values of its rows and works on its own queries.

    Args:
        q: queries.
        k: keys.
        v: values.
        segment_ids: the document of each position, 0 at padding.
        sliding_window: how many keys a query sees, its own one included; None for all.
        kind: `xla`, the whole square of scores; `chunked`, block by block in plain JAX, memory linear
            in length; `splash`, a Pallas kernel for TPUs; `cudnn`, cuDNN's for NVIDIA's GPUs, whose mask is
            the whole square; `auto`, the one for the device and the shape.

    Raises:
        InputError: for a kind that the device or the shape does not allow, and where `tensor` does
            not divide the heads.
    """
    return run_kind(kernel_for(q, kind), q, k, v, segment_ids, sliding_window)


def without_cache(
    segment_ids: Int[Array, "batch seq"], sliding_window: int | None, kind: str = "auto"
) -> Callable[[Array, Array, Array], tuple[Array, None]]:
    """`attend` as a layer takes it, with nothing to hand on."""
    return lambda q, k, v: (attend(q, k, v, segment_ids, sliding_window=sliding_window, kind=kind), None)


def kernel_for(q: Float[Array, "batch seq heads head_dim"], kind: str) -> str:
    """The kernel that `kind` means for these queries, of which only shape and type count.

    Raises:
        InputError: where the device or the shape does not allow it.
    """
    if kind not in KINDS:
        raise InputError(f"attention {kind!r} is not known; give one of {', '.join(KINDS)}")
    chosen = _auto(q) if kind == "auto" else kind
    refusal = _refusal(chosen, q)
    if refusal is not None:
        raise InputError(f"attention {chosen!r} {refusal}; give 'auto' or 'chunked'")
    return chosen


def _auto(q: Array) -> str:
    length, device = q.shape[1], platform()
    if device == "tpu":
        return "splash" if length >= SPLASH_BLOCK else "xla"
    if device == "gpu":
        return "cudnn" if length <= _CUDNN_LENGTH and _refusal("cudnn", q) is None else "chunked"
    return "xla" if length <= _XLA_LENGTH and _refusal("xla", q) is None else "chunked"


def _refusal(kind: str, q: Array) -> str | None:
    """Why the kernel does not take these queries on this device; None if it does."""
    device, (_, length, _, head_dim) = platform(), q.shape
    if kind == "splash" and device != "tpu":
        return f"runs on TPUs, and this is a {device}"
    if kind == "xla" and device == "cpu" and q.dtype == jnp.float16:
        # JAX's own asks for a way to multiply float16 that CPUs do not have.
        return "cannot multiply float16 on a CPU"
    if kind != "cudnn":
        return None
    if device != "gpu":
        return f"runs on NVIDIA GPUs, and this is a {device}"
    if is_before_ampere():
        return "runs on NVIDIA GPUs from Ampere on, and this one is older"
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        return f"takes bfloat16 or float16, and the model is {q.dtype}"
    if head_dim > 128 or head_dim % 8:
        return f"takes a head_dim of up to 128 that is a multiple of 8, and the model's is {head_dim}"
    if length % 2:
        return f"takes an even length, and this one is {length}"
    return None


def run_kind(
    kind: str, q: Array, k: Array, v: Array, segment_ids: Array, sliding_window: int | None, interpret: bool = False
) -> Float[Array, "batch seq heads head_dim"]:
    """`attend` by the one kind named, whether or not the device is made for it."""
    mesh, (batch, length) = ambient_mesh(), q.shape[:2]
    check_tensor_axis(mesh.shape["tensor"], {"attention heads": q.shape[2], "key-value heads": k.shape[2]})
    shards, rows = mesh.shape["context"], math.prod(mesh.shape[axis] for axis in RULES["batch"])
    # Rows and positions of padding, which see but themselves, up to what mesh and kernel can cut.
    missing = -batch % rows, -length % (shards * (SPLASH_BLOCK if kind == "splash" else 1))
    if any(missing):
        padding = tuple((0, more) for more in missing)
        q, k, v = (jnp.pad(x, (*padding, (0, 0), (0, 0))) for x in (q, k, v))
        segment_ids = jnp.pad(segment_ids, padding)
    kernel, kernel_spec = None, None
    if kind == "splash":
        from phi3_jax.model.splash import splash_attention, splash_kernel  # Pallas takes a second to load

        kernel = splash_kernel(q.shape[1], q.shape[2] // mesh.shape["tensor"], shards, sliding_window, interpret)
        kernel_spec = kernel.manual_sharding_spec(NamedSharding(mesh, PartitionSpec(None, "context")))

    def local(kernel: PyTree, q: Array, k: Array, v: Array, q_ids: Array, kv_ids: Array, q_start: Array | int) -> Array:
        if kind == "splash":
            return splash_attention(kernel, q, k, v, q_ids, kv_ids)
        if kind == "chunked":
            return flash_attention(q, k, v, q_ids, kv_ids, jnp.int32(q_start), sliding_window)
        mask = visible(q_ids, kv_ids, q_start, 0, sliding_window)[:, None]
        if kind == "cudnn":
            from phi3_jax.system.compat_cudnn import masked_attention  # what else is private to JAX comes along

            # cuDNN leaves out the future where it knows of it, which it only can for whole rows.
            return masked_attention(q, k, v, mask, is_causal=shards == 1)
        return jax.nn.dot_product_attention(q, k, v, mask=mask, implementation="xla")

    if mesh.size == 1:
        return local(kernel, q, k, v, segment_ids, segment_ids, 0)[:, :length]
    return _over_mesh(local, mesh, kernel, kernel_spec, q, k, v, segment_ids)[:batch, :length]


def _over_mesh(
    local: Callable[..., Array],
    mesh: AbstractMesh,
    kernel: PyTree,
    kernel_spec: PyTree,
    q: Array,
    k: Array,
    v: Array,
    segment_ids: Array,
) -> Array:
    """`local` on every device for its rows, heads and queries, with all keys of the rows."""

    def device(kernel: PyTree, q: Array, k: Array, v: Array, ids: Array) -> Array:
        if mesh.shape["context"] == 1:
            return local(kernel, q, k, v, ids, ids, 0)
        k, v = (jax.lax.all_gather(x, "context", axis=1, tiled=True) for x in (k, v))
        q_start = jax.lax.axis_index("context") * q.shape[1]
        return local(kernel, q, k, v, jax.lax.dynamic_slice_in_dim(ids, q_start, q.shape[1], axis=1), ids, q_start)

    heads = PartitionSpec(RULES["batch"], RULES["seq"], RULES["heads"])
    return jax.shard_map(
        device,
        mesh=mesh,
        # Of the ids, which are small, every device has the whole row.
        in_specs=(kernel_spec, heads, heads, heads, PartitionSpec(RULES["batch"])),
        out_specs=heads,
        # The check asks that loops start from values marked as differing between devices, and the
        # kernels, which also run without a mesh, start theirs from constants.
        check_vma=False,
    )(kernel, q, k, v, segment_ids)
