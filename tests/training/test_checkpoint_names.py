"""Which folders are checkpoints that count."""

from phi3_jax.training.checkpoint_names import DAMAGED, REMOVING, SAVING, SUPERSEDED, UNFINISHED, steps_of


def test_what_does_not_count_is_no_step_and_what_is_kept_is_not_unfinished(tmp_path):
    for name in ("7", "10", *(f"11{end}" for end in (SAVING, REMOVING, DAMAGED, SUPERSEDED, f"{SUPERSEDED}2"))):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    assert steps_of(tmp_path) == [7, 10]
    names = {path.name for path in (tmp_path / "checkpoints").iterdir() if UNFINISHED.fullmatch(path.name)}
    assert names == {f"11{SAVING}", f"11{REMOVING}"}


def test_a_run_without_checkpoints(tmp_path):
    assert steps_of(tmp_path) == []
