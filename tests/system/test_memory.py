"""How much memory there is, as the system says it."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from phi3_jax.model.cache import cache_bytes, empty_cache
from phi3_jax.parallel.mesh import devices_memory, make_mesh
from phi3_jax.system import memory
from phi3_jax.system.memory import free_memory, total_memory
from tests.helpers.models import tiny_model


def test_a_limit_of_the_container_counts(tmp_path, monkeypatch):
    (tmp_path / "memory.max").write_text("3000000\n")
    (tmp_path / "memory.current").write_text("1000000\n")
    monkeypatch.setattr(memory, "_CGROUP", tmp_path)
    assert (total_memory(), free_memory()) == (3_000_000, 2_000_000)
    (tmp_path / "memory.max").write_text("max\n")
    assert total_memory() > 10**8


@pytest.mark.skipif(not Path("/proc/meminfo").exists(), reason="reads what Linux says")
def test_what_is_taken_is_not_free():
    before = free_memory()
    assert before < total_memory()
    block = bytearray(2**29)
    assert before - free_memory() > 2**28
    del block


@pytest.mark.skipif(sys.platform != "linux", reason="reads what Linux says of a process")
def test_the_hosts_peak_is_this_processs_own():
    """Not that of the process which started it, which Linux's getrusage counts when it is the larger one."""
    code = """
from phi3_jax.system.memory import resident_peak
before = resident_peak()
block = bytearray(2**28)
del block
print(before, resident_peak())
"""
    parent = f"import subprocess, sys; ballast = bytearray(2**30); subprocess.run([sys.executable, '-c', {code!r}])"
    done = subprocess.run([sys.executable, "-c", parent], capture_output=True, text=True, check=True)
    before, after = map(int, done.stdout.split())
    assert before < 2**30  # the imports
    assert 2**28 < after < before + 1.1 * 2**28


def test_devices_that_count_say_what_they_hold(monkeypatch):
    assert devices_memory() == total_memory()  # a CPU
    device = SimpleNamespace(memory_stats=lambda: {"bytes_limit": 7, "bytes_in_use": 1})
    mesh = make_mesh({})
    monkeypatch.setattr(jax, "local_devices", lambda *_: [device])
    assert devices_memory() == 7
    with jax.set_mesh(mesh):  # of one device
        assert devices_memory() == 7


@pytest.mark.parametrize("window", [None, 5])
def test_the_size_of_a_cache(window):
    config = tiny_model(2, sliding_window=window).config
    cache = empty_cache(config, 3, 16, jnp.bfloat16)
    assert cache_bytes(config, 3, 16, jnp.bfloat16) == cache.k.nbytes + cache.v.nbytes
