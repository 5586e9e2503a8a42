"""Profiles of steps: what is in them, where they lie, and what is said of those that never come."""

import gzip
import json
from pathlib import Path

import jax
import pytest

from phi3_jax.system.errors import InputError
from phi3_jax.training import loop
from phi3_jax.training.loop import train
from phi3_jax.training.profile import StepProfiler, profile_folder, tell_of_memory
from tests.helpers.runs import run_config, weights, write_inputs


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    return write_inputs(tmp_path_factory.mktemp("profile"))


def short(inputs: Path, output: str, **logging: str):
    training = {"max_steps": 4, "save_steps": 3, "eval_strategy": "no"}
    return run_config(inputs, output, data={"eval": None}, training=training, logging=logging)


def profiled(folder: Path) -> tuple[set[int], bytes]:
    """The numbers of the steps in the one profile in the folder, and the file with the programs' parts."""
    (trace,) = folder.glob("plugins/profile/*/*.trace.json.gz")
    (space,) = folder.glob("plugins/profile/*/*.xplane.pb")
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    assert any("hlo_op" in event.get("args", {}) for event in events), "no operation of a program"
    assert any(event.get("name") == "rows" for event in events)
    numbers = {int(event["args"]["step_num"]) for event in events if "step_num" in event.get("args", {})}
    data = jax.profiler.ProfileData.from_file(str(space))
    assert numbers == {
        int(value)
        for plane in data.planes
        for line in plane.lines
        for event in line.events
        for name, value in event.stats
        if name == "step_num"
    }
    return numbers, space.read_bytes()


def test_the_steps_asked_for_are_in_the_profile_by_their_parts_and_the_run_is_the_same(inputs, capsys):
    run = short(inputs, "out", profile="2:4")
    train(run)
    said = capsys.readouterr().out
    folder = Path(run.training.output_dir) / "profile"
    numbers, programs = profiled(folder)
    assert numbers == {2, 3}
    for part in (b"attention/qkv_proj", b"attention/attend", b"mlp/down_proj", b"loss", b"optimizer"):
        assert part in programs
    assert b"model" in gzip.decompress((folder / "memory.prof").read_bytes()), "no place in the code"
    assert f"wrote a profile of 2 steps (2 to 3) to {folder}" in " ".join(said.split())
    without = short(inputs, "without")
    train(without)
    out, other = (Path(one.training.output_dir) / "adapter" for one in (run, without))
    assert weights(out) == weights(other)
    # Gone on with from step 3, the steps are over.
    resumed = run.changed({"training.resume_from_checkpoint": str(Path(run.training.output_dir) / "checkpoints" / "3")})
    train(resumed)
    said = " ".join(capsys.readouterr().out.split())
    assert "not used: logging.profile 2:4, since the run goes on from step 3, and those steps are over" in said
    assert "never" not in said
    assert len(list(folder.glob("plugins/profile/*"))) == 1


def test_steps_beyond_the_last_epoch_are_refused_before_the_folder_is_made(inputs):
    run = short(inputs, "refused").changed({"training.max_steps": -1, "logging.profile": "900:902"})
    with pytest.raises(InputError, match=r"logging\.profile is 900:902, but the run has \d+ steps"):
        train(run)
    assert not Path(run.training.output_dir).exists()


def test_part_of_the_steps_is_recorded_where_a_run_goes_on_among_them(tmp_path):
    said: list[str] = []
    profiler = StepProfiler(range(10, 13), tmp_path, said.append)
    profiler.go_on_from(9)
    assert not said
    profiler.go_on_from(11)
    assert said == ["logging.profile 10:13 begins at step 12: the run goes on from step 11"]
    with profiler.step(12):
        pass
    assert profiler.is_last(12)
    profiler.finish(12)
    profiler.close(12)
    assert "wrote a profile of 1 step (12 to 12)" in said[1]
    assert len(said) == 2


def test_a_run_that_ends_before_or_within_the_steps_says_so(tmp_path):
    said: list[str] = []
    before = StepProfiler(range(10, 13), tmp_path, said.append)
    before.close(7)
    within = StepProfiler(range(2, 5), tmp_path, said.append)
    with within.step(2):
        pass
    within.close(2)
    assert said[0] == "warning: the run ended at step 7, before the steps of logging.profile 10:13"
    assert said[1] == "warning: the run ended at step 2, within logging.profile"
    assert "wrote a profile of 1 step (2 to 2)" in said[2]


def test_what_keeps_a_profile_from_being_written_is_said_and_stops_nothing(tmp_path):
    said: list[str] = []
    (tmp_path / "profile").write_text("a file")
    profiler = StepProfiler(range(1, 2), tmp_path, said.append)
    with profiler.step(1):
        pass
    profiler.close(1)
    assert len(said) == 1
    assert said[0].startswith("warning: logging.profile 1:2 is not recorded (")


def test_each_of_several_hosts_has_a_folder(tmp_path, monkeypatch):
    assert profile_folder(tmp_path) == tmp_path / "profile"
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    assert profile_folder(tmp_path) == tmp_path / "profile" / "host-1"


def test_a_run_without_memory_leaves_what_was_in_it(inputs, monkeypatch, capsys):
    def take(self):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 8 bytes.")

    monkeypatch.setattr(loop.Trainer, "_take_step", take)
    run = short(inputs, "full")
    with pytest.raises(jax.errors.JaxRuntimeError):
        train(run)
    file = Path(run.training.output_dir) / "profile" / "memory.prof"
    assert gzip.decompress(file.read_bytes())
    assert f"warning: out of memory; {file} has what was in it" in " ".join(capsys.readouterr().out.split())
    said: list[str] = []
    tell_of_memory(file, said.append)  # beneath a file there is no folder
    assert said[0].startswith("warning: what is in the device's memory could not be written")
