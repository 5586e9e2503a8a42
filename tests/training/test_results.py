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
def test_the_hosts_peak_is_what_the_system_says():
    """In a process of its own: others may have set what the system says back."""
    code = """
import re
from pathlib import Path
from phi3_jax.training.results import peak_memory
block = bytearray(2**27)
del block
status = Path("/proc/self/status").read_text()
seen = int(re.search(r"VmHWM:\\s+(\\d+) kB", status)[1]) * 1024
assert seen <= peak_memory()["host_peak_bytes"] <= 1.05 * seen
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_devices_peak_is_that_of_the_fullest_one_where_any_is_counted(monkeypatch):
    assert peak_memory()["device_peak_bytes"] is None  # a CPU does not count
    stats = [None, {"bytes_in_use": 9}, *({"peak_bytes_in_use": peak} for peak in (5, 7, 6))]
    devices = [SimpleNamespace(memory_stats=lambda entry=entry: entry) for entry in stats]
    monkeypatch.setattr(jax, "local_devices", lambda: devices)
    assert peak_memory()["device_peak_bytes"] == 7
