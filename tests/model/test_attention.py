"""Attention of every kind against the plain one, on one device and over simulated meshes."""

import os
import subprocess
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from phi3_jax.model import attention
from phi3_jax.model.attention import attend
from phi3_jax.parallel.mesh import make_mesh
from phi3_jax.system.errors import InputError
from tests.helpers.attention import assert_close, inputs, packed, program, reference, segments

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


def test_cudnn_is_told_the_same_mask(monkeypatch):
    """There is no GPU here: what cuDNN is asked for is done by the plain implementation."""
    asked = []

    def stand_in(*arrays, is_causal):
        asked.append(is_causal)
        return jax.nn.dot_product_attention(*arrays[:3], mask=arrays[3], is_causal=is_causal, implementation="xla")

    monkeypatch.setattr("phi3_jax.system.compat_cudnn.masked_attention", stand_in)
    monkeypatch.setattr(attention, "platform", lambda: "gpu")
    *arrays, _ = inputs(30, 4, 2, dtype=jnp.bfloat16)
    for kind in ("cudnn", "auto"):
        out = attend(*arrays, packed(30), sliding_window=7, kind=kind)
        np.testing.assert_array_equal(out, attend(*arrays, packed(30), sliding_window=7, kind="xla"))
    assert asked == [True, True]


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
        ("cpu", "xla", jnp.float16, "'xla' cannot multiply float16 on a CPU; give 'auto' or 'chunked'"),
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
