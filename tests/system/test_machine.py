"""Which accelerators a machine has, and what is missing where JAX uses none."""

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from phi3_jax.system.machine import Machine, look_at_machine, what_is_missing

ROOT = Path(__file__).parents[2]
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]


@pytest.fixture
def put(tmp_path):
    """Writes a file below a root."""

    def write(path: str, text: str = "") -> Path:
        file = tmp_path / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
        return tmp_path

    return write


@pytest.mark.parametrize(
    ("path", "text", "found"),
    [
        ("proc/driver/nvidia/version", "NVRM version: NVIDIA UNIX  580.65.06  Sun", Machine(True, 580)),
        ("proc/driver/nvidia/version", "NVRM version: NVIDIA UNIX  535.129.03  Sun", Machine(True, 535)),
        ("proc/driver/nvidia/gpus/0000:01:00.0/information", "", Machine(True)),
        ("dev/nvidia0", "", Machine(True)),
        ("dev/nvidia3", "", Machine(True)),
        ("usr/lib/wsl/lib/libcuda.so.1", "", Machine(True)),
        ("dev/accel0", "", Machine(has_tpu=True)),
        ("dev/accel/accel0", "", Machine()),  # an accelerator of somebody else's
        ("dev/vfio/0", "", Machine()),
        ("dev/nvidiactl", "", Machine()),
    ],
)
def test_accelerators_are_known_by_their_drivers(put, path, text, found):
    assert look_at_machine(put(path, text), {}) == found


def test_a_tpu_that_vfio_hands_over_is_known_by_its_maker(put):
    put("dev/vfio/0")
    root = put("sys/bus/pci/devices/0000:00:05.0/vendor", "0x1ae0\n")
    assert look_at_machine(root, {}).has_tpu


def test_a_tpu_vm_is_known_by_its_variables_and_a_card_by_its_program(put, tmp_path):
    assert look_at_machine(tmp_path, {"TPU_ACCELERATOR_TYPE": "v5litepod-8"}).has_tpu
    put("bin/nvidia-smi")
    (tmp_path / "bin" / "nvidia-smi").chmod(0o755)
    assert look_at_machine(tmp_path, {"PATH": str(tmp_path / "bin")}) == Machine(True)


NONE, ALL = (lambda name: False), (lambda name: True)


@pytest.mark.parametrize(
    ("machine", "environment", "has_module", "expected"),
    [
        (Machine(), {}, NONE, "no TPU or GPU was found"),
        (Machine(), {"JAX_PLATFORMS": "cpu"}, ALL, "no TPU or GPU was found"),
        (
            Machine(True, 580),
            {},
            NONE,
            "no TPU or GPU was found; JAX saw an NVIDIA card and has no plug-in for it: pip install 'phi3_jax[cuda13]'",
        ),
        # Such as the command line itself sets where libtpu is there to plan with.
        (Machine(True, 535), {"JAX_PLATFORMS": "cpu"}, lambda name: name == "libtpu", "pip install 'phi3_jax[cuda12]'"),
        (Machine(has_tpu=True), {}, NONE, "JAX saw a TPU and has no plug-in for it: pip install 'phi3_jax[tpu]'"),
        (Machine(True), {"JAX_PLATFORMS": "cpu"}, ALL, "an NVIDIA card is there, and JAX_PLATFORMS=cpu keeps JAX from"),
        (Machine(True), {"JAX_PLATFORMS": "cuda,cpu"}, ALL, "could not start its plug-in for it (no cuda)"),
    ],
)
def test_what_is_missing_is_said_with_what_to_do(machine, environment, has_module, expected):
    said = what_is_missing(machine, environment, has_module=has_module, reason=lambda platform: f"no {platform}")
    assert expected in said
    assert "\n" not in said


def test_every_extra_that_a_page_or_a_message_names_is_there():
    files = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/**/*.md"), *ROOT.glob("phi3_jax/**/*.py")]
    named = {
        extra
        for file in [*files, *ROOT.glob("examples/**/*")]
        if file.is_file() and file.suffix != ".png"
        for extras in re.findall(r"(?:phi3_jax|\s[\"']?\.)\[([a-z0-9,-]+)\]", file.read_text(encoding="utf-8"))
        for extra in extras.split(",")
    }
    assert {"cuda13", "tpu", "eval"} <= named
    assert named <= EXTRAS.keys()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("extra", "package"), [("cuda12", "jax-cuda12-plugin"), ("cuda13", "jax-cuda13-plugin"), ("tpu", "libtpu")]
)
def test_the_extra_of_a_device_resolves(extra, package):
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--quiet", "--no-build-isolation", "--report", "-"]
    done = subprocess.run([*command, f"{ROOT}[{extra}]"], capture_output=True, text=True, check=False)
    if "No matching distribution found for setuptools" in done.stderr or "ConnectionError" in done.stderr:
        pytest.skip("no package index can be reached")
    assert done.returncode == 0, done.stderr
    found = {entry["metadata"]["name"] for entry in json.loads(done.stdout)["install"]}
    assert package in found
