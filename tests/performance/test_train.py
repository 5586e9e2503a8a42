"""`phi3-jax benchmark train`: what is measured is a run's step, and the figures are what they say."""

import json
import math
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml

from phi3_jax.cli import main
from phi3_jax.config.run import RunConfig
from phi3_jax.objectives.next_token import loss
from phi3_jax.parallel.hardware import HARDWARE
from phi3_jax.performance import train as benchmark
from tests.helpers.benchmarks import CONFIG, seen_by_command

TINY = ["--hidden", "64", "--layers", "2", "--heads", "4", "--kv-heads", "2", "--vocab", "96", "--seq", "24"]


def tiny_run(**training) -> RunConfig:
    return RunConfig.from_dict(
        {
            "model": {"name_or_path": "random", "dtype": "float32"},
            "peft": {"r": 4, "lora_dropout": 0.0, "target_modules": "all-linear"},
            "data": {"max_length": 24},
            "training": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, **training},
        }
    )


def test_the_last_line_is_json_whose_figures_fit_together(monkeypatch, capsys):
    # A clock that tells 7 s for compiling, 10 s for the step of the warm-up, then 1, 4 and 2 s.
    clock = iter([0.0, 7.0, 10.0, 20.0, 20.0, 21.0, 30.0, 34.0, 40.0, 42.0])
    monkeypatch.setattr(benchmark, "time", SimpleNamespace(perf_counter=clock.__next__))
    assert main(["benchmark", "train", *TINY, "--batch", "3", "--rank", "4", "--steps", "3", "--warmup", "1"]) == 0
    *table, last = capsys.readouterr().out.splitlines()
    result = json.loads(last)
    assert any(line.startswith("tokens per second") for line in table)
    assert (result["compile_seconds"], result["step_seconds"], result["tokens_per_second"]) == (7, 2, 3 * 24 / 2)
    assert 0 < result["peak_memory_gb"] < 64
    assert (result["memory_kind"], result["device_kind"], result["devices"]) == ("process", "cpu", 1)
    assert result["mfu"] is None
    assert result["steps"] == 3
    assert result["loss"] == pytest.approx(math.log(96), abs=0.2)  # of tokens that nobody can foretell
    # reference: 4N + 6·N_lora + 12·L·h·S_avg, of which the causal mean over 24 places is 12.5.
    qkv, mlp = 64 * (64 + 2 * 32) + 64 * 64, 3 * 64 * 192
    adapters = 4 * (64 + 128 + 64 + 64 + 64 + 384 + 192 + 64) * 2
    assert result["trainable_parameters"] == adapters
    wanted = 4 * (2 * (qkv + mlp) + 96 * 64) + 6 * adapters + 12 * 2 * 64 * 12.5
    assert result["flops_per_token"] == pytest.approx(wanted, rel=1e-12)
    assert result["settings"] | {"kv_heads": 2, "intermediate": 192, "rank": 4} == result["settings"]


def test_the_step_is_that_of_training():
    run = tiny_run(lr_scheduler_type="constant")
    workload = benchmark.prepare(run, CONFIG, steps=2)
    job = workload.job
    batch = benchmark.random_batch(np.random.default_rng(0), run, CONFIG, rows=2, documents=3)
    model, lora = job.model_and_lora(workload.state.trainable)
    assert job.trainable["model"] == jax.tree.map(lambda _: None, job.trainable["model"])
    losses = [float(loss(model, lora, {name: x[i] for name, x in batch.items()})) for i in range(2)]
    before = jax.tree.map(jnp.copy, workload.state.trainable)
    state = workload.train_step(workload.state, job.frozen, job.devices.put(batch, 2))
    window = jax.device_get(state.window)
    # All tokens but the first of each of three documents are targets, in four rows.
    assert int(window.target_tokens) == 4 * (24 - 3)
    np.testing.assert_allclose(float(window.loss) / int(window.target_tokens), np.mean(losses), rtol=1e-5)
    moved = jax.tree.map(lambda a, b: bool(jnp.any(a != b)), before, state.trainable)
    assert any(jax.tree.leaves(moved))


def test_documents_share_a_row_evenly():
    run = tiny_run()
    batch = benchmark.random_batch(np.random.default_rng(1), run, CONFIG, rows=2, documents=5)
    assert {array.shape for array in batch.values()} == {(2, 2, 24)}
    segments, positions = batch["segment_ids"][1, 0], batch["positions"][1, 0]
    lengths = np.bincount(segments)[1:]
    assert len(lengths) == 5
    assert set(lengths) <= {4, 5}
    np.testing.assert_array_equal(positions, np.concatenate([np.arange(n) for n in lengths]))
    assert batch["loss_mask"].all()
    assert not np.array_equal(batch["input_ids"][0], batch["input_ids"][1])


def test_flops_count_the_keys_within_window_and_document_and_mfu_is_of_the_peak(monkeypatch):
    run = tiny_run()
    workload = benchmark.prepare(run, CONFIG, steps=1)
    monkeypatch.setattr(benchmark, "hardware", lambda: HARDWARE["NVIDIA H200"])
    base = benchmark._speed(run, CONFIG, workload, 24 // 2, 0.5)
    # Of 24 tokens in documents of 2 each sees 1.5 keys on average; in one document the window leaves most 5 keys.
    whole = benchmark._speed(run, CONFIG, workload, 1, 0.5)
    seen = (1 + 2 + 3 + 4 + 20 * 5) / 24
    assert whole["flops_per_token"] - base["flops_per_token"] == pytest.approx(12 * 2 * 64 * (seen - 1.5))
    assert whole["mfu"] == pytest.approx(whole["flops_per_token"] * 96 / 0.5 / 989e12)


def test_a_configuration_brings_its_models_shape_without_weights(monkeypatch, capsys, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG.to_dict()))
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump({"model": {"name_or_path": str(tmp_path)}, "peft": {"r": 5}}))
    run, config, _ = seen_by_command(
        monkeypatch, capsys, "--config", str(file), "--seq", "16", "--training.optim", "lion"
    )
    assert config == CONFIG
    assert (run.peft.r, run.data.max_length, run.training.optim, run.training.remat) == (5, 16, "lion", "full")
    assert main(["benchmark", "train", "--config", str(file), "--hidden", "64"]) == 2
    assert "--hidden is given, but model.name_or_path" in capsys.readouterr().err
    assert main(["benchmark", "train", "--config", str(file), "--seq", "4097"]) == 2
    assert "4,097 tokens long, but the model has 4,096 positions" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ("tran", "unknown benchmark tran; did you mean train"),
        ("train --hiden 64", "unknown option --hiden; did you mean --hidden"),
        ("train --steps 0", "0 is no whole number of at least 1"),
        ("train --hidden 63", "--hidden 63 is odd"),
        ("train --hidden 64 --heads 64", "does not make 64 heads of an even width"),
        ("train --hidden 64 --heads 4 --kv-heads 3", "--heads 4 cannot share 3"),
        ("train --dtype float8", "model.dtype is 'float8'"),
        ("train --seq 1", "data.max_length is 1"),
        ("train --seq 8 --documents 5", "5 documents in a row of 8 tokens"),
        ("train --seq 8 --data.max_length 9", "--data.max_length and the short option"),
        ("train --remat most", "training.remat_policy is 'most'"),
        ("train --peft.init_lora_weights eva", "peft.init_lora_weights is eva"),
        ("train --training.gradient_checkpoint true", "unknown option --training.gradient_checkpoint; did you mean"),
        ("train --parallel.fsdp 3", "parallel"),
        ("train --peft.r", "--peft.r: expected one argument"),
    ],
)
def test_bad_values_are_one_line_and_status_2(capsys, arguments, complaint):
    assert main(["benchmark", *arguments.split()]) == 2
    output = capsys.readouterr()
    assert complaint in output.err
    assert (output.err.count("\n"), output.out) == (1, "")
