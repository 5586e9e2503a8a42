"""How far a run has come."""

from phi3_jax.training.progress import Progress


def test_results_are_per_target_token_and_per_second():
    results = Progress(step=6, seconds=2.0, loss=30.0, target_tokens=10, tokens=40).results(epoch=1.5, rows=16)
    assert results["epoch"] == 1.5
    assert results["train_loss"] == 3
    assert (results["train_steps_per_second"], results["train_tokens_per_second"]) == (3, 20)
    assert Progress().results(epoch=1.5, rows=16)["train_loss"] == 0
