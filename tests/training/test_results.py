"""What a run tells about itself in its report."""

import subprocess
import sys
from types import SimpleNamespace

import jax
import pytest

from phi3_jax.training.results import command_line, peak_memory


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["/somewhere/bin/phi3-jax", "train", "--config", "a b.yaml"], "phi3-jax train --config 'a b.yaml'"),
        (["scripts/train.py", "--config", "c.yaml"], "python scripts/train.py --config c.yaml"),
    ],
)
def test_the_command_is_the_one_that_was_typed(monkeypatch, argv, expected):
    monkeypatch.setattr(sys.modules["__main__"], "__file__", argv[0], raising=False)
    monkeypatch.setattr(sys, "argv", argv)
    assert command_line() == expected


def test_a_notebook_has_no_command_but_another_can_be_given(monkeypatch):
    monkeypatch.delattr(sys.modules["__main__"], "__file__", raising=False)
    monkeypatch.setattr(sys, "argv", ["/lib/ipykernel_launcher.py", "-f", "/tmp/kernel-1.json"])
    assert command_line() == ""
    assert command_line(["phi3-jax", "train", "--config", "a b/config.yaml"]).endswith("'a b/config.yaml'")


@pytest.mark.skipif(sys.platform != "linux", reason="reads what Linux says of a process")
def test_the_hosts_peak_is_this_processs_own():
    """Not that of the process which started it, which Linux's getrusage counts when it is the larger one."""
    code = """
import jax
from phi3_jax.training.results import peak_memory
before = peak_memory()["host_peak_bytes"]
block = bytearray(2**28)
del block
print(before, peak_memory()["host_peak_bytes"])
"""
    parent = f"import subprocess, sys; ballast = bytearray(2**30); subprocess.run([sys.executable, '-c', {code!r}])"
    done = subprocess.run([sys.executable, "-c", parent], capture_output=True, text=True, check=True)
    before, after = map(int, done.stdout.split())
    assert before < 2**30  # the imports
    assert 2**28 < after < before + 1.1 * 2**28


def test_the_devices_peak_is_that_of_the_fullest_one_where_any_is_counted(monkeypatch):
    assert peak_memory()["device_peak_bytes"] is None  # a CPU does not count
    stats = [None, {"bytes_in_use": 9}, *({"peak_bytes_in_use": peak} for peak in (5, 7, 6))]
    devices = [SimpleNamespace(memory_stats=lambda entry=entry: entry) for entry in stats]
    monkeypatch.setattr(jax, "local_devices", lambda: devices)
    assert peak_memory()["device_peak_bytes"] == 7
