"""What a checkpoint consists of, so that damage shows."""

import json

import pytest
import xxhash

from phi3_jax.system.manifest import Damaged, change_score, check, check_files, write_manifest


@pytest.fixture
def sealed(tmp_path):
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / "x").write_bytes(b"abc")
    write_manifest(tmp_path, 1.5)
    return tmp_path


def test_a_whole_checkpoint_gives_its_score(sealed):
    assert check(sealed, thoroughly=True) == 1.5
    change_score(sealed, 0.5)
    assert check(sealed, thoroughly=True) == 0.5


def test_the_loss_of_an_older_manifest_is_its_score(sealed):
    raw = json.loads((sealed / "manifest.json").read_text())
    old = {"files": raw["files"], "eval_loss": 2.5}
    digest = xxhash.xxh3_128_hexdigest(json.dumps(old, sort_keys=True).encode())
    (sealed / "manifest.json").write_text(json.dumps({**old, "digest": digest}))
    assert check(sealed, thoroughly=True) == 2.5


@pytest.mark.parametrize(("content", "message"), [(b"abcd", "4 bytes instead of 3"), (b"abd", "not what was written")])
def test_damage_is_named(sealed, content, message):
    (sealed / "state" / "x").write_bytes(content)
    with pytest.raises(Damaged, match=message):
        check(sealed, thoroughly=True)


def test_some_of_the_files_are_looked_at_by_themselves(sealed):
    (sealed / "another").write_bytes(b"put there later")
    check_files(sealed, ["state/x", "another"])
    (sealed / "state" / "x").write_bytes(b"abd")
    check_files(sealed, ["another"])
    with pytest.raises(Damaged, match="state/x is not what was written"):
        check_files(sealed, ["state/x"])


def test_a_manifest_that_was_edited_is_damage(sealed):
    raw = json.loads((sealed / "manifest.json").read_text())
    (sealed / "manifest.json").write_text(json.dumps({**raw, "score": 0.0}))
    with pytest.raises(Damaged, match=r"manifest\.json is not what was written"):
        check(sealed, thoroughly=False)
