"""Attention of every kind against the plain one, on one device and over simulated meshes."""

import os
import subprocess
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from phi3_jax.model import attention, flash
from phi3_jax.model.attention import attend, run_kind
from phi3_jax.model.flash import visible
from phi3_jax.model.remat import remat_policy
from phi3_jax.parallel.mesh import make_mesh
from phi3_jax.system.errors import InputError


def inputs(length, heads, kv_heads, head_dim=8, batch=2, dtype=jnp.float32):
    """q, k, v and the output's gradient."""
    keys = jax.random.split(jax.random.key(length), 4)
    shapes = [(batch, length, n, head_dim) for n in (heads, kv_heads, kv_heads, heads)]
    return [jax.random.normal(key, shape).astype(dtype) for key, shape in zip(keys, shapes, strict=True)]


def segments(*rows):
    """Rows of documents, each given as (id, length)."""
    return jnp.array([np.concatenate([np.full(n, i) for i, n in row]) for row in rows], jnp.int32)


def program(kind, window, **options):
    """From q, k, v, the output's gradient and segment ids to the output and the gradients of q, k and v."""

    @jax.jit
    def run(q, k, v, d_out, ids):
        out, back = jax.vjp(lambda q, k, v: run_kind(kind, q, k, v, ids, window, **options), q, k, v)
        return out, *back(d_out)

    return run


def reference(q, k, v, d_out, ids, window):
    """The same from the definition, in NumPy and float64, with repeated keys and values."""
    group = q.shape[2] // k.shape[2]
    q, k, v, d_out = (np.asarray(x, np.float64).swapaxes(1, 2) for x in (q, k, v, d_out))  # [B, N, T, H]
    k, v = k.repeat(group, axis=1), v.repeat(group, axis=1)
    ids, index = np.asarray(ids), np.arange(q.shape[2])
    distance = index[:, None] - index
    seen = (distance >= 0) & (distance < (window or len(index))) & (ids[:, :, None] == ids[:, None])
    scale = q.shape[-1] ** -0.5
    scores = np.where(seen[:, None], q @ k.swapaxes(2, 3) * scale, -np.inf)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    d_weights = d_out @ v.swapaxes(2, 3)
    d_scores = weights * (d_weights - (weights * d_weights).sum(axis=-1, keepdims=True)) * scale
    shared = (weights @ v, d_scores @ k, d_scores.swapaxes(2, 3) @ q, weights.swapaxes(2, 3) @ d_out)
    out, dq, dk, dv = (x.swapaxes(1, 2) for x in shared)
    dk, dv = (x.reshape(*x.shape[:2], -1, group, x.shape[3]).sum(axis=3) for x in (dk, dv))
    return out, dq, dk, dv


def assert_close(actual, expected, tolerance):
    """Differences within `tolerance` of the largest value (or of 1, where all should be 0)."""
    for ours, theirs in zip(actual, expected, strict=True):
        ours = np.asarray(ours, np.float64)
        assert np.abs(ours - theirs).max() <= tolerance * max(np.abs(theirs).max(), 1)


def packed(length):
    """Two rows: documents and padding on the right; padding on both sides and ids that return."""
    a, b = length // 3, length // 5
    return segments(
        ((1, a), (2, b), (3, length - a - 2 * b), (0, b)), ((0, b), (1, a), (7, length - a - 3 * b), (1, b), (0, b))
    )


CASES = [  # kind, length, heads, kv heads, window
    ("xla", 130, 4, 2, 7),
    ("chunked", 1, 2, 2, None),
    ("chunked", 17, 4, 1, 5),
    ("chunked", 130, 4, 2, 7),  # a window smaller than a block, and a last block that is not full
    ("chunked", 400, 6, 2, 150),  # a window over two borders of blocks
]


@pytest.mark.parametrize(("kind", "length", "heads", "kv_heads", "window"), CASES)
def test_kinds_equal_the_definition(kind, length, heads, kv_heads, window):
    arrays, ids = inputs(length, heads, kv_heads), packed(length)
    assert_close(program(kind, window)(*arrays, ids), reference(*arrays, ids, window), 2e-6)


def test_splash_equals_the_definition():
    """Interpreted, at a length that is filled up to two of its blocks."""
    arrays, ids = inputs(200, 4, 2, head_dim=128, batch=1), packed(200)[:1]
    assert_close(program("splash", 150, interpret=True)(*arrays, ids), reference(*arrays, ids, 150), 5e-6)


@pytest.mark.optimized
@pytest.mark.parametrize(("length", "constant"), [(17, True), (300, False)])
def test_chunked_in_bfloat16(length, constant):
    """As near as bfloat16 comes. With all optimizations: where ids are known when compiling, XLA's CPU
    backend may make products for which it has no bfloat16 kernel, and says so only when they run."""
    arrays, ids = inputs(length, 4, 4 if constant else 2, dtype=jnp.bfloat16), packed(length)
    run = program("chunked", None)
    if constant:
        ids = jnp.ones_like(ids)
        run = jax.jit(lambda *arrays: program("chunked", None)(*arrays[:4], jnp.ones_like(arrays[4])))
    ours = run(*arrays, ids)
    assert all(x.dtype == jnp.bfloat16 for x in ours)
    assert_close(ours, reference(*arrays, ids, None), 1e-2)


def test_mask():
    ids = packed(30)
    seen = visible(ids, ids, 0, 0, 7)[:, None]
    for row in range(2):
        for query in range(30):
            expected = [k for k in range(query - 6, query + 1) if k >= 0 and ids[row, k] == ids[row, query]]
            assert np.flatnonzero(seen[row, 0, query]).tolist() == expected


@pytest.mark.parametrize("window", [None, 258, 383])
def test_splash_mask_is_the_mask_that_its_blocks_say(window):
    """Blocks of a single value, which the kernel visits or not without looking further, are told right."""
    from phi3_jax.model.splash import _WindowMask

    length, size = 768, 128
    mask = _WindowMask((length, length), (None if window is None else window - 1, 0), 0)
    ids = jnp.ones((1, length), int)
    expected = np.asarray(visible(ids, ids, 0, 0, window)[0])
    kinds = set()
    for i in range(0, length, size):
        for j in range(0, length, size):
            index = slice(i, i + size), slice(j, j + size)
            kinds.add(mask[index].shape)
            np.testing.assert_array_equal(np.broadcast_to(mask[index], (size, size)), expected[index])
    assert kinds == {(1, 1), (size, size)}


def test_cudnn_is_told_the_same_mask(monkeypatch):
    """There is no GPU here: what cuDNN is asked for is done by the plain implementation."""
    plain, asked = jax.nn.dot_product_attention, []

    def stand_in(*arrays, implementation, **options):
        asked.append(implementation)
        return plain(*arrays, implementation="xla", **options)

    monkeypatch.setattr(jax.nn, "dot_product_attention", stand_in)
    monkeypatch.setattr(attention, "platform", lambda: "gpu")
    *arrays, _ = inputs(30, 4, 2, dtype=jnp.bfloat16)
    for kind in ("cudnn", "auto"):
        out = attend(*arrays, packed(30), sliding_window=7, kind=kind)
        np.testing.assert_array_equal(out, attend(*arrays, packed(30), sliding_window=7, kind="xla"))
    assert asked == ["cudnn", "xla"] * 2


def test_hidden_blocks_are_not_computed():
    """What is hidden from a document spoils it if it is touched: a NaN times a weight of zero is a NaN."""
    size = flash._block_size(1024)
    q, k, v, d_out = inputs(4 * size, 2, 1, batch=3)
    ids = segments(*[((1, size), (2, 2 * size), (3, size))] * 3)
    spoiled = (slice(0, size), slice(size, 4 * size), slice(0, 1))  # a row's keys that are NaN

    def finite(window, ids):
        """Where the output and the gradient of q are numbers."""
        k_nan, v_nan = k, v
        for row, keys in enumerate(spoiled):
            k_nan, v_nan = k_nan.at[row, keys].set(jnp.nan), v_nan.at[row, keys].set(jnp.nan)
        out, dq, *_ = program("chunked", window)(q, k_nan, v_nan, d_out, ids)
        return jnp.isfinite(out).all(axis=(2, 3)) & jnp.isfinite(dq).all(axis=(2, 3))

    by_document = finite(None, ids)
    assert by_document[0, size:].all()  # of the document before
    assert by_document[1, :size].all()  # of the future
    assert not by_document[2, :size].any()  # visible
    in_window = finite(20, jnp.ones_like(ids))
    assert in_window[0, 2 * size :].all()  # beyond the window
    assert not in_window[0, :size].any()


def test_block_ranges():
    """First block and end for blocks of 4, over two rows, and for a part of the row that starts at 8."""
    rows = segments(((1, 6), (2, 6), (3, 3), (0, 1)), ((1, 8), (2, 8)))
    padded_rows = segments(((0, 8), (5, 8)))

    @jax.jit
    def ranges(rows, padded_rows, start):
        blocks, padded = flash._cut_segments(rows, 4), flash._cut_segments(padded_rows, 4)
        whole = [flash.block_ranges(blocks, blocks, 0, window) for window in (None, 2, 1)]
        part = flash.block_ranges(blocks[2:], blocks, start, None)
        return [*whole, part, flash.block_ranges(padded, padded, 0, None)]

    found = ranges(rows, padded_rows, jnp.int32(8))
    by_document, two, one, part, padded = (list(zip(*np.array(pair).tolist(), strict=True)) for pair in found)
    assert by_document == [(0, 1), (0, 2), (1, 3), (2, 4)]
    assert two == [(0, 1), (0, 2), (1, 3), (2, 4)]
    assert one == [(0, 1), (1, 2), (2, 3), (3, 4)]
    assert part == [(1, 3), (2, 4)]
    assert padded == [(0, 1), (0, 2), (2, 3), (2, 4)]


@pytest.mark.optimized
def test_chunked_needs_memory_linear_in_length():
    def temporary(length):
        arrays = [jax.ShapeDtypeStruct((1, length, 2, 16), jnp.float32)] * 3
        ids = jax.ShapeDtypeStruct((1, length), jnp.int32)
        total = jax.grad(lambda q, k, v, ids: jnp.sum(run_kind("chunked", q, k, v, ids, None)), (0, 1, 2))
        compiled = jax.jit(total).lower(*arrays, ids).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporary(4096) < 4.5 * temporary(1024)


def test_attention_policy_spares_the_second_forward_pass():
    """Loops in the gradient's program: two forward, two backward, and two more where it is run again."""
    q, k, v, _ = inputs(300, 2, 1)

    def loops(policy):
        body = jax.checkpoint(lambda q: run_kind("chunked", jnp.sin(q), k, v, packed(300), None), policy=policy)
        return jax.jit(jax.grad(lambda q: jnp.sum(body(q) ** 2))).lower(q).as_text().count("stablehlo.while")

    assert loops(remat_policy("attention")) == 4
    assert loops(remat_policy("full")) == 6


@pytest.mark.parametrize(
    ("device", "length", "head_dim", "dtype", "expected"),
    [
        ("cpu", 64, 64, jnp.float32, "xla"),
        ("cpu", 512, 64, jnp.float32, "chunked"),
        ("gpu", 512, 96, jnp.bfloat16, "cudnn"),
        ("gpu", 512, 96, jnp.float32, "chunked"),
        ("gpu", 512, 256, jnp.bfloat16, "chunked"),
        ("gpu", 511, 96, jnp.bfloat16, "chunked"),
        ("gpu", 16384, 96, jnp.bfloat16, "chunked"),
        ("tpu", 512, 96, jnp.float32, "splash"),
        ("tpu", 64, 96, jnp.bfloat16, "xla"),
    ],
)
def test_auto_follows_device_and_shape(monkeypatch, device, length, head_dim, dtype, expected):
    monkeypatch.setattr(attention, "platform", lambda: device)
    monkeypatch.setattr(attention, "run_kind", lambda kind, *_: kind)
    q = jax.ShapeDtypeStruct((1, length, 1, head_dim), dtype)
    assert attend(q, q, q, None, sliding_window=None) == expected


@pytest.mark.parametrize(
    ("device", "kind", "dtype", "message"),
    [
        ("cpu", "flash", jnp.float32, "attention 'flash' is not known; give one of auto, xla, cudnn, splash, chunked"),
        ("gpu", "splash", jnp.bfloat16, "'splash' runs on TPUs, and this is a gpu; give 'auto' or 'chunked'"),
        ("cpu", "cudnn", jnp.bfloat16, "'cudnn' runs on NVIDIA GPUs, and this is a cpu; give 'auto' or 'chunked'"),
        ("gpu", "cudnn", jnp.float32, "'cudnn' takes bfloat16 or float16, and the model is float32; give"),
    ],
)
def test_kinds_that_the_device_lacks(monkeypatch, device, kind, dtype, message):
    monkeypatch.setattr(attention, "platform", lambda: device)
    q = jnp.ones((1, 8, 1, 8), dtype)
    with pytest.raises(InputError) as error:
        attend(q, q, q, jnp.ones((1, 8), int), sliding_window=None, kind=kind)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


# --- over a mesh of 8 simulated devices, which need a process of their own ---


def test_meshes_equal_one_device():
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    code = "from tests.model.test_attention import check_meshes; check_meshes()"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("checked") == 6


def check_meshes():
    """Documents and windows across the cuts; the collectives that the sharding needs, and no other."""
    jax.config.update("jax_disable_most_optimizations", True)
    # Local queries start within blocks of keys: 80 positions a device, blocks of 112 keys.
    arrays = inputs(320, 4, 2, batch=4)
    ids = segments(
        ((1, 90), (2, 150), (3, 30), (0, 50)), ((0, 40), (1, 280)), ((1, 320),), ((1, 159), (2, 1), (3, 160))
    )
    expected = reference(*arrays, ids, 100)
    check = partial(_check_mesh, arrays=arrays, ids=ids, window=100, expected=expected)
    # Keys and values gathered, their gradients scattered.
    assert check("chunked", {"context": 4, "tensor": 2}) == (2, 2, 0)
    assert check("chunked", {"data": 2, "fsdp": 2, "tensor": 2}) == (0, 0, 0)
    assert check("xla", {"fsdp": 2, "context": 2, "tensor": 2}) == (2, 2, 0)
    # Rows and positions that do not divide are filled up.
    odd = [x[:3, :318] for x in arrays]
    expected = reference(*odd, ids[:3, :318], 100)
    _check_mesh("chunked", {"fsdp": 2, "context": 4}, odd, ids[:3, :318], 100, expected)

    long, long_ids = inputs(500, 4, 2, head_dim=128, batch=1), packed(500)[:1]
    expected = reference(*long, long_ids, None)
    _check_mesh("splash", {"context": 4, "tensor": 2}, long, long_ids, None, expected, interpret=True)
    _check_heads()


def _check_mesh(kind, parallel, arrays, ids, window, expected, **options):
    """The numbers of gathers, scatters and sums over devices in the program, whose results are right."""
    with jax.set_mesh(make_mesh(parallel)):
        lowered = program(kind, window, **options).lower(*arrays, ids)
        assert_close(lowered.compile()(*arrays, ids), expected, 5e-6)
    print("checked")
    text = lowered.as_text()
    return tuple(text.count(f"stablehlo.{name}") for name in ("all_gather", "reduce_scatter", "all_reduce"))


def _check_heads():
    with jax.set_mesh(make_mesh({"tensor": 4})):
        for heads, kv_heads, message in ((6, 2, "6 attention heads"), (8, 2, "2 key-value heads")):
            q, k, v, _ = inputs(8, heads, kv_heads)
            with pytest.raises(InputError, match=f"parallel.tensor is 4, which does not divide {message}"):
                attend(q, k, v, jnp.ones((2, 8), jnp.int32), sliding_window=None)
    print("checked")
