"""A run's figures in event files."""

from phi3_jax.training.tensorboard import TensorBoard


def test_figures_of_evaluations_have_a_place_of_their_own(tmp_path):
    board = TensorBoard(tmp_path / "events", step=0)
    board.write(3, {"loss": 1.5, "eval_accuracy": 0.5})
    board.close()
    (file,) = (tmp_path / "events").iterdir()
    content = file.read_bytes()
    assert b"train/loss" in content
    assert b"eval/accuracy" in content
