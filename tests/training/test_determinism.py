"""The same seed, data and mesh give the same adapter, bit for bit; and a run says what it ran on."""

import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from phi3_jax.training import versions as module
from phi3_jax.training.versions import PACKAGES, versions, write_versions
from tests.helpers.mesh_runs import write_inputs

MESHES = [[1, 1, 1, 1], [1, 2, 2, 1]]


@pytest.mark.slow
def test_two_processes_train_the_same_adapter(tmp_path):
    """On one CPU device and on a mesh of four simulated ones."""
    adapters, lines = [], []
    for seed in ("1", "2"):  # of Python's hashes, so that the order of sets differs
        folder = tmp_path / seed
        folder.mkdir()
        write_inputs(folder)
        done = subprocess.run(
            [sys.executable, "-m", "tests.helpers.mesh_runs", str(folder), json.dumps(MESHES)],
            env={**os.environ, "PYTHONHASHSEED": seed, "XLA_FLAGS": "--xla_force_host_platform_device_count=4"},
            cwd=Path(__file__).parents[2],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        runs = [folder / "_".join(map(str, mesh)) for mesh in MESHES]
        adapters.append([(run / "adapter" / "adapter_model.safetensors").read_bytes() for run in runs])
        rows = [[json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()] for run in runs]
        lines.append([[{k: v for k, v in row.items() if k != "tokens_per_second"} for row in run] for run in rows])
    assert adapters[0] == adapters[1]
    assert lines[0] == lines[1]
    assert adapters[0][0] != adapters[0][1]  # another mesh sums in another order


def test_the_versions_of_everything(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_dump_to=https://me:hunter2hunter2@host/x")
    found = versions()
    assert found["transformers"] == version("transformers")
    assert all(found[name] for name in PACKAGES)
    assert found["devices"] == "1"
    assert found["backend"].startswith("cpu")
    assert found["XLA_FLAGS"] == "--xla_dump_to=https://REDACTED@host/x"


def test_a_clone_names_its_commit(tmp_path):
    assert module._commit(tmp_path) is None
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run([*git, "init", "-q"], check=True)
    (tmp_path / "file").write_text("a")
    subprocess.run([*git, "add", "file"], check=True)
    subprocess.run([*git, "commit", "-q", "-m", "one"], check=True)
    head = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()
    assert module._commit(tmp_path) == head
    (tmp_path / "file").write_text("b")
    assert module._commit(tmp_path) == f"{head}-dirty"


def test_other_versions_on_resuming_are_told_and_kept(tmp_path, monkeypatch):
    path = tmp_path / "versions.json"
    assert write_versions(path) is None
    now = json.loads(path.read_text())
    assert now == [versions()]
    assert write_versions(path) is None
    assert json.loads(path.read_text()) == now
    monkeypatch.setattr(module, "versions", lambda: {**now[0], "jax": "9.9"})
    assert write_versions(path) == f"jax ({now[0]['jax']} then, 9.9 now)"
    assert [entry["jax"] for entry in json.loads(path.read_text())] == [now[0]["jax"], "9.9"]
