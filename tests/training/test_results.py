"""What a run tells about itself in its report."""

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


def test_the_devices_peak_is_that_of_the_fullest_one_where_any_is_counted(monkeypatch):
    assert peak_memory()["device_peak_bytes"] is None  # a CPU does not count
    stats = [None, {"bytes_in_use": 9}, *({"peak_bytes_in_use": peak} for peak in (5, 7, 6))]
    devices = [SimpleNamespace(memory_stats=lambda entry=entry: entry) for entry in stats]
    monkeypatch.setattr(jax, "local_devices", lambda: devices)
    assert peak_memory()["device_peak_bytes"] == 7
