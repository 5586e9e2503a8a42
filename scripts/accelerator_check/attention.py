"""Every attention kernel of this device against scores in float32 on the CPU: outputs and gradients."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from accelerator_check.record import Recorder
from accelerator_check.sizes import Sizes
from phi3_jax.model import attention
from phi3_jax.model.products import precise
from phi3_jax.system.errors import InputError

Inputs = tuple[Array, Array, Array, Array]  # queries, keys, values, a gradient of the output
Outputs = tuple[Array, Array, Array, Array]  # the output, the gradients of queries, keys and values
# ‖a - b‖ / ‖b‖. At full size a window of 35 that is off by one key makes 0.06.
LIMITS = {"float32": (2e-5, 1e-4), "bfloat16": (1e-2, 2e-2)}


@dataclass(frozen=True)
class Case:
    """Rows to attend in.

    Attributes:
        name: What they are.
        documents: How many share a row, behind which is padding where there are several.
        window: Of attention.
    """

    name: str
    documents: int
    window: int | None


def cases(sizes: Sizes) -> list[Case]:
    """Whole rows and packed ones, and a window of each: one that spans blocks, and one that ends within documents."""
    tokens = sizes.attention_tokens
    return [
        Case("whole row", 1, None),
        Case("whole row, window", 1, tokens // 3 + 1),
        Case("packed", 4, None),
        Case("packed, window", 3, tokens // 60 + 1),
    ]


def check_attention(sizes: Sizes, recorder: Recorder) -> None:
    """Compares every kernel in every case and type; says which are not for this device, and why."""
    told: set[str] = set()
    for heads, kv_heads, width in sizes.heads:
        for case in cases(sizes):
            drawn = draw(sizes.attention_tokens, heads, kv_heads, width)
            ids = segment_ids(sizes.attention_tokens, case.documents)
            expected = reference(*drawn, ids, case.window)
            for dtype in LIMITS:
                q, k, v, g = (x.astype(dtype) for x in drawn)
                inputs = q, k, v, g
                for kind in attention.KINDS[1:]:  # but auto, which is one of them
                    refusal = _refusal(kind, inputs[0])
                    if refusal is not None:
                        if refusal not in told:
                            recorder.note(f"{kind}, {dtype}", f"left out: {refusal}")
                        told.add(refusal)
                        continue
                    name = f"{kind}, {dtype}, {case.name}, {heads}/{kv_heads} heads of {width}"
                    _compare(name, kind, inputs, ids, case.window, expected, recorder)


def _compare(
    name: str, kind: str, inputs: Inputs, ids: Array, window: int | None, expected: Outputs, recorder: Recorder
) -> None:
    dtype = str(inputs[0].dtype)
    try:
        found = run(kind, *inputs, ids, window)
    except Exception as error:  # of one kernel; the others are still to be seen
        recorder.error(name, float("nan"), LIMITS[dtype][0], _first_line(error))
        return
    errors = [distance(a, b) for a, b in zip(found, expected, strict=True)]
    forward, backward = LIMITS[dtype]
    recorder.error(name, errors[0], forward, "output")
    worst = int(np.argmax(errors[1:]))
    recorder.error(name, errors[1:][worst], backward, f"gradients, the worst of {'qkv'[worst]}")


def _refusal(kind: str, q: Array) -> str | None:
    """Why a kernel is not for this device or these queries."""
    try:
        attention.kernel_for(q, kind)
    except InputError as error:
        return str(error)
    return None


def draw(tokens: int, heads: int, kv_heads: int, width: int) -> Inputs:
    """Queries, keys, values and a gradient of the output, of one row each, in float32 and the same on every machine.

    They are numbers of bfloat16, so that one reference is the truth for both types.
    """
    rng = np.random.default_rng(0)
    shapes = [(1, tokens, number, width) for number in (heads, kv_heads, kv_heads, heads)]
    drawn = (jnp.asarray(rng.standard_normal(shape, np.float32), jnp.bfloat16) for shape in shapes)
    q, k, v, g = (x.astype(jnp.float32) for x in drawn)
    return q, k, v, g


def segment_ids(tokens: int, documents: int) -> Int[Array, "1 seq"]:
    """Documents of uneven lengths; of several, with padding behind them."""
    if documents == 1:
        return jnp.ones((1, tokens), jnp.int32)
    ends = np.cumsum(np.arange(1, documents + 1)) * tokens // (documents * (documents + 1) // 2 + 1)
    ids = 1 + np.searchsorted(ends, np.arange(tokens), side="right")
    return jnp.asarray(np.where(ids > documents, 0, ids)[None], jnp.int32)


def run(kind: str, q: Array, k: Array, v: Array, g: Array, ids: Array, window: int | None) -> Outputs:
    """The output and the gradients of queries, keys and values, zero at padding."""

    def attend(q: Array, k: Array, v: Array) -> Array:
        out = attention.attend(q, k, v, ids, sliding_window=window, kind=kind)
        return jnp.where(ids[..., None, None] != 0, out, 0)

    def both(q: Array, k: Array, v: Array, g: Array) -> Outputs:
        with precise(q.dtype):
            out, backward = jax.vjp(attend, q, k, v)
            return out, *backward(g)

    found: Outputs = jax.jit(both)(q, k, v, g)
    return found


def reference(q: Array, k: Array, v: Array, g: Array, ids: Array, window: int | None) -> Outputs:
    """The same by its definition, in float32 on the CPU; nothing of it is the package's."""
    cpu = jax.devices("cpu")[0]
    q, k, v, g = (jax.device_put(np.asarray(x, np.float32), cpu) for x in (q, k, v, g))
    seen = np.asarray(ids)

    def attend(q: Array, k: Array, v: Array) -> Float[Array, "1 seq heads width"]:
        group = q.shape[2] // k.shape[2]
        k, v = jnp.repeat(k, group, 2), jnp.repeat(v, group, 2)
        scores = jnp.einsum("bqhd,bkhd->bhqk", q, k, precision="highest") / np.sqrt(np.float32(q.shape[-1]))
        distance = np.arange(q.shape[1])[:, None] - np.arange(q.shape[1])
        mask = (distance >= 0) & (distance < (window or q.shape[1])) & (seen[0][:, None] == seen[0])
        weights = jax.nn.softmax(jnp.where(mask, scores, -jnp.inf), axis=-1)
        out = jnp.einsum("bhqk,bkhd->bqhd", weights, v, precision="highest")
        return jnp.where(seen[..., None, None] != 0, out, 0)

    def both(q: Array, k: Array, v: Array, g: Array) -> Outputs:
        out, backward = jax.vjp(attend, q, k, v)
        return out, *backward(g)

    found: Outputs = jax.jit(both)(q, k, v, g)  # where they lie
    return found


def distance(a: Array, b: Array) -> float:
    """‖a - b‖ / ‖b‖ in float64."""
    x, y = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return float(np.linalg.norm(x - y) / np.linalg.norm(y))


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:200]}"
