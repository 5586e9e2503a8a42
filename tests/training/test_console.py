"""What a run shows where nobody watches."""

from phi3_jax.system.telling import at_verbosity
from phi3_jax.training.console import RunConsole


def test_rows_are_lines_and_nothing_steers_the_terminal(capsys):
    console = RunConsole(progress=True)
    console.start(0, 4)
    console.figures({"step": 2, "loss": 1.5, "tokens_per_second": 1234.0, "learning_rate": 1e-3}, 4)
    console.figures({"step": 3, "tokens_per_second": 1.0, "learning_rate": 0.0}, 4)
    console.print("a [bracket] \x1b[2J")
    console.stop()
    out = capsys.readouterr().out
    assert "step 2/4  loss 1.5000  1,234 tokens/s  lr 1.00e-03" in out
    assert "step 3/4  all steps skipped" in out
    assert "a [bracket] \\x1b[2J" in out


def test_before_and_after_leave_intervals_out(capsys):
    figures = {"eval_loss": 2.0, "eval_loss_interval": (1.0, 3.0)}
    RunConsole(progress=False).before_and_after(figures, {**figures, "eval_loss": 1.0})
    assert capsys.readouterr().out.splitlines() == ["loss: 2.0000 before, 1.0000 after"]


def test_a_quiet_run_shows_warnings_and_results(capsys):
    with at_verbosity("quiet"):
        console = RunConsole(progress=True)
    console.start(0, 4)
    console.figures({"step": 2, "loss": 1.5, "tokens_per_second": 1234.0, "learning_rate": 1e-3}, 4)
    console.print("a line")
    console.print("warning: a step was skipped")
    console.before_and_after({"eval_loss": 2.0}, {"eval_loss": 1.0})
    console.result("wrote out")
    console.stop()
    assert capsys.readouterr() == ("loss: 2.0000 before, 1.0000 after\nwrote out\n", "warning: a step was skipped\n")
