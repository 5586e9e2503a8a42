"""What a run ran on: the versions of everything that its numbers depend on."""

import json
import os
import platform
import subprocess
from pathlib import Path

import jax

from phi3_jax.system.files import write_text
from phi3_jax.system.packages import package_versions
from phi3_jax.system.secrets import redact

PACKAGES = (
    "phi3_jax",
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "grain",
    "transformers",
    "tokenizers",
    "datasets",
    "safetensors",
    "numpy",
    "ml_dtypes",
)
# What tells a compiler to compute otherwise.
VARIABLES = ("XLA_FLAGS", "LIBTPU_INIT_ARGS", "JAX_DEFAULT_MATMUL_PRECISION", "NVIDIA_TF32_OVERRIDE")


def versions() -> dict[str, str]:
    """Packages, Python, platform, devices, and the settings of XLA that are not its own, for people to read."""
    found = package_versions(*PACKAGES)
    commit = _commit(Path(__file__).parents[2])
    if commit is not None:
        found["phi3_jax commit"] = commit
    found |= {"python": platform.python_version(), "platform": platform.platform()}
    devices = jax.devices()
    found |= {"device": devices[0].device_kind, "devices": str(len(devices)), "processes": str(jax.process_count())}
    backend = devices[0].client.platform_version.splitlines()
    found |= {"backend": f"{jax.default_backend()} {' '.join(backend)}".strip()}
    return found | {name: redact(os.environ[name]) for name in VARIABLES if os.environ.get(name)}


def _commit(root: Path) -> str | None:
    """The commit of a clone, with `-dirty` where files differ from it; None where the package is none."""
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude", "*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def write_versions(path: Path) -> str | None:
    """Writes them as JSON; a list, where a run that is resumed has others than before, the newest last.

    Returns:
        How they differ from the last ones, in words; None where they do not.
    """
    now, before = versions(), _read(path)
    last = before[-1] if before else now
    changes = [
        f"{name} ({last.get(name, 'none')} then, {now.get(name, 'none')} now)"
        for name in dict.fromkeys([*last, *now])
        if last.get(name) != now.get(name)
    ]
    if changes or not before:
        write_text(path, json.dumps([*before, now], indent=2) + "\n")
    return "; ".join(changes) or None


def _read(path: Path) -> list[dict[str, str]]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []
    return found if isinstance(found, list) and all(isinstance(entry, dict) for entry in found) else []
