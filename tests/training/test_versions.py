"""What a run ran on, kept beside it."""

import json

from phi3_jax.training import versions


def test_other_versions_than_before_are_told_and_added(tmp_path, monkeypatch):
    path = tmp_path / "versions.json"
    assert versions.write_versions(path) is None
    assert versions.write_versions(path) is None
    (first,) = json.loads(path.read_text())
    assert {"jax", "python", "device"} <= set(first)
    monkeypatch.setattr(versions, "versions", lambda: {**first, "jax": "9.9"})
    assert versions.write_versions(path) == f"jax ({first['jax']} then, 9.9 now)"
    assert [entry["jax"] for entry in json.loads(path.read_text())] == [first["jax"], "9.9"]
