"""What is said while rows are prepared."""

import pytest

from phi3_jax.data import progress


@pytest.fixture
def at_once(monkeypatch):
    """Everything is shown, however soon."""
    monkeypatch.setattr(progress, "SECONDS", -1)
    monkeypatch.setattr(progress, "_EVERY", -1)


def run(rows: int = 3) -> None:
    with progress.watched("rendering", 3) as advance:
        for _ in range(rows):
            advance(1)


def test_what_is_done_at_once_is_not_spoken_of(capfd):
    run()
    assert capfd.readouterr() == ("", "")


def test_what_takes_longer_is_two_lines_where_nobody_watches(capfd, at_once):
    run()
    out, said = capfd.readouterr()
    first, last = said.splitlines()
    assert (out, first) == ("", "rendering 3 rows ...")
    assert last.startswith("rendering 3 rows took 0.")


def test_a_terminal_gets_a_bar(capfd, monkeypatch, at_once):
    monkeypatch.setenv("FORCE_COLOR", "1")  # by which rich takes any file for a terminal

    def fail() -> None:
        with progress.watched("rendering", 8) as advance:
            advance(5)
            raise ValueError("a bad row")

    with pytest.raises(ValueError, match="a bad row"):
        fail()
    said = capfd.readouterr().err
    assert "5/8" in said
    assert "took" not in said  # it has not come to its end
    assert said.count("\x1b[?25h") == 1  # the cursor is shown again


def test_other_processes_say_nothing(capfd, monkeypatch, at_once):
    monkeypatch.setattr(progress, "is_main", lambda: False)
    run()
    progress.tell("something")
    assert capfd.readouterr() == ("", "")


def test_lines_do_not_steer_a_terminal(capfd):
    progress.tell("\x1b[2Ja [folder]")
    assert capfd.readouterr().err == "\\x1b[2Ja [folder]\n"
