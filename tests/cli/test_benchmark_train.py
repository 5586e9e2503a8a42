"""`phi3-jax benchmark train`: what its options mean."""

from phi3_jax.cli import main
from tests.helpers.benchmarks import seen_by_command


def test_short_options_and_keys_of_a_run_make_the_same_run(monkeypatch, capsys):
    short = (
        "--seq 8192 --batch 3 --accumulation 4 --dtype bfloat16 --quantization nf4 --rank 7 --remat dots "
        "--attention xla"
    )
    long = (
        "--data.max_length 8192 --training.per_device_train_batch_size=3 --training.gradient_accumulation_steps 4 "
        "--model.dtype bfloat16 --model.quantization nf4 --peft.r 7 --training.gradient_checkpointing true "
        "--training.remat_policy dots --model.attention xla"
    )
    run, config, _ = seen_by_command(monkeypatch, capsys, *short.split())
    same, _, _ = seen_by_command(monkeypatch, capsys, *long.split())
    assert run == same
    assert (run.data.max_length, run.training.remat, run.peft.r) == (8192, "dots", 7)
    assert config.max_position_embeddings == 8192
    plain, _, counts = seen_by_command(monkeypatch, capsys, "--steps", "4")
    assert (plain.training.remat, counts) == ("none", {"steps": 4, "warmup": 2, "documents": 1})


def test_help_lists_what_there_is(capsys):
    assert main(["benchmark"]) == 0
    assert "phi3-jax benchmark train" in capsys.readouterr().out
    assert main(["benchmark", "train", "--help"]) == 0
    assert "peak_memory_gb" in capsys.readouterr().out
