"""`phi3-jax benchmark`: which of the benchmarks."""

from phi3_jax.cli import main


def test_the_benchmarks_are_named(capsys):
    assert main(["benchmark"]) == 0
    assert "benchmark train|generate" in capsys.readouterr().out
    assert main(["benchmark", "generat"]) == 2
    assert "unknown benchmark generat; did you mean generate?" in capsys.readouterr().err
