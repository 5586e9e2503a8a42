"""What is said while something goes on."""

import itertools
import threading
from types import SimpleNamespace

import pytest

from phi3_jax.system import telling


@pytest.fixture
def at_once(monkeypatch):
    """Everything is shown, however soon."""
    monkeypatch.setattr(telling, "SECONDS", -1)
    monkeypatch.setattr(telling, "_EVERY", -1)


def run(rows: int = 3) -> None:
    with telling.watched("rendering", 3) as advance:
        for _ in range(rows):
            advance(1)


def load() -> None:
    with telling.taking("loading"):
        pass


def test_what_is_done_at_once_is_not_spoken_of(capfd):
    run()
    load()
    assert list(telling.taking_first("answering", iter([1, 2]))) == [1, 2]
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("work", "doing", "looks"), [(run, "rendering 3 rows", 4), (load, "loading", 1)], ids=["rows", "a step"]
)
def test_what_takes_longer_is_two_lines_where_nobody_watches(work, doing, looks, capfd, monkeypatch, at_once):
    clock = itertools.count(7, 1.25)  # which goes on whenever it is looked at
    monkeypatch.setattr(telling, "time", SimpleNamespace(monotonic=clock.__next__))
    work()
    assert capfd.readouterr() == ("", f"{doing} ...\n{doing} took {looks * 1.25:.1f} s\n")


def test_a_step_is_spoken_of_while_it_goes_on(capfd, monkeypatch):
    monkeypatch.setattr(telling, "SECONDS", 0.01)
    told = threading.Event()
    tell = telling.tell
    monkeypatch.setattr(telling, "tell", lambda text: (tell(text), told.set()))
    with telling.taking("compiling"):
        assert told.wait(60)
        assert capfd.readouterr().err == "compiling ...\n"
    assert capfd.readouterr().err.startswith("compiling took ")


def test_a_step_that_fails_has_taken_no_time(capfd, at_once):
    with pytest.raises(ValueError, match="a bad file"), telling.taking("loading"):
        raise ValueError("a bad file")
    assert capfd.readouterr().err == "loading ...\n"


def test_a_terminal_gets_a_bar(capfd, monkeypatch, at_once):
    monkeypatch.setenv("FORCE_COLOR", "1")  # by which rich takes any file for a terminal

    def fail() -> None:
        with telling.watched("rendering", 8) as advance:
            advance(5)
            raise ValueError("a bad row")

    with pytest.raises(ValueError, match="a bad row"):
        fail()
    said = capfd.readouterr().err
    assert "5/8" in said
    assert "took" not in said  # it has not come to its end
    assert said.count("\x1b[?25h") == 1  # the cursor is shown again


def test_other_processes_say_nothing(capfd, monkeypatch, at_once):
    monkeypatch.setattr(telling, "is_speaker", lambda: False)
    telling.tell_first(lambda: "device")
    run()
    load()
    telling.tell("something")
    assert capfd.readouterr() == ("", "")


def test_lines_do_not_steer_a_terminal(capfd):
    telling.tell("\x1b[2Ja [folder]")
    assert capfd.readouterr().err == "\\x1b[2Ja [folder]\n"


def test_the_first_line_is_found_out_and_said_once_before_any_other(capfd):
    with telling.at_verbosity(None):
        telling.tell_first(lambda: "device: cpu")
        assert capfd.readouterr().err == ""
        load()  # is not spoken of itself
        telling.tell("base: x")
        assert capfd.readouterr().err == "device: cpu\nbase: x\n"
        telling.tell_first(lambda: "device: cpu")
    telling.tell("another command's")
    assert capfd.readouterr().err == "another command's\n"


def test_a_level_holds_within_and_none_changes_nothing(capfd):
    with telling.at_verbosity("quiet"):
        with telling.at_verbosity(None):
            assert telling.verbosity() == "quiet"
        telling.tell("something")
        with telling.at_verbosity("verbose"):
            assert telling.verbosity() == "verbose"
            load()
            run()
    assert telling.verbosity() == "normal"
    said = [line.partition(" took")[0] for line in capfd.readouterr().err.splitlines()]
    assert said == ["loading ...", "loading", "rendering 3 rows ...", "rendering 3 rows"]
