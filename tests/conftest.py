"""Fixtures that every folder of tests uses."""

import gc
import os
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import jax
import pytest

from phi3_jax.system import telling

# Whether a step takes long enough to be spoken of must not depend on how busy the machine is.
telling.SECONDS = 1e6

# Many tests compile the same small programs, and most of a run's time is compiling: what one test
# (or a process that it starts) has compiled, the next one loads. Thrown away with the run.
_compiled = tempfile.TemporaryDirectory(prefix="phi3_jax-compiled-")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", _compiled.name)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
# What is kept beside the hub's cache, of data sets that tests take long to prepare too, is thrown away as well.
_hub = tempfile.TemporaryDirectory(prefix="phi3_jax-hub-")
os.environ["HF_HOME"] = _hub.name


def pytest_collection_finish(session: pytest.Session) -> None:
    """Has the garbage collector leave alone what stays to the end, and look at the rest more rarely.

    Tracing makes and drops so many objects that looking through all modules again and again takes 4% of a run.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 50)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Has XLA leave out most optimizations, which saves a third of the time of tests that compile much.

    Not where our numbers are held against PyTorch's, where memory is measured, and in slow tests: there
    the programs are those that users run.
    """
    as_for_users = "parity" in item.path.parts or any(map(item.get_closest_marker, ("slow", "optimized")))
    jax.config.update("jax_disable_most_optimizations", not as_for_users)


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """Lets a worker's compiled programs go before they are too many.

    Each takes some mappings of memory, of which Linux gives a process 65,530: the next one ends it.
    """
    if nextitem is None or nextitem.path == item.path:
        return
    maps = Path("/proc/self/maps")
    if maps.exists() and len(maps.read_bytes().splitlines()) > 20_000:
        jax.clear_caches()
        gc.collect()


@pytest.fixture(scope="session")
def testdata() -> Path:
    """Real tokenizers, configs, data sets and a small trained model, where they are at hand."""
    root = Path(__file__).parents[1]
    folder = Path(os.environ.get("PHI3_JAX_TESTDATA", root.parent / "shared" / "testdata"))
    if not folder.is_dir():
        pytest.skip(f"test data not found at {folder}; set PHI3_JAX_TESTDATA")
    return folder


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 3 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "none", disk], capture_output=True, check=False)
    if mounted.returncode:
        pytest.skip("mounting is not allowed here")
    yield disk
    subprocess.run(["umount", disk], check=True)
