"""Losses and gradients that are not finite: what is skipped, what is told, what is left when it is too much."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from phi3_jax.config.training import TrainingSection
from phi3_jax.training.loop import train
from tests.helpers.mesh_runs import write_inputs as write_mesh_inputs
from tests.helpers.models import random_lora, tiny_model
from tests.helpers.nonfinite import POISON, bad_rows, good_rows, overflowing, plant, poison
from tests.helpers.rows import accumulated
from tests.helpers.runs import cut_off, metrics, run_config, start, write_inputs

SETTINGS = {"learning_rate": 1e-2, "warmup_ratio": 0.0, "lr_scheduler_type": "constant"}


def poisoned(model, value=jnp.nan, token=POISON):
    table = model.model.embed_tokens.weight
    table.set_value(table.get_value().at[token].set(value))
    return model


def same(one, other):
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


@pytest.mark.parametrize(("optim", "value"), [("adamw", jnp.nan), ("adafactor", jnp.inf)])
def test_a_step_that_is_not_finite_changes_nothing(optim, value):
    model = poisoned(tiny_model(1), value)
    training = TrainingSection(**SETTINGS, optim=optim, weight_decay=0.1)
    state, frozen, step = start(model, random_lora(model), training)
    good = [accumulated(good_rows(seed), 2) for seed in range(2)]
    bad = accumulated(bad_rows(), 2)  # one of its two micro-batches is fine
    state = step(state, frozen, good[0])
    kept = jax.tree.map(np.array, (state.trainable, state.opt_state, state.good))
    loss, norm = float(state.window.loss), float(state.window.grad_norm)
    for number in (1, 2):
        state = step(state, frozen, bad)
        same((state.trainable, state.opt_state, state.good), kept)
        assert (int(state.skips.in_a_row), int(state.skips.total), int(state.step)) == (number, number, 1 + number)
        assert (float(state.window.loss), float(state.window.grad_norm)) == (loss, norm)
    state = step(state, frozen, good[1])
    assert (int(state.skips.in_a_row), int(state.skips.total)) == (0, 2)
    assert jax.device_get(state.skips).since(0) == [1, 2]
    # As if the bad ones had never been.
    other, frozen, _ = start(model, random_lora(model), training)
    for batch in good:
        other = step(other, frozen, batch)
    same((state.trainable, state.opt_state, state.good), (other.trainable, other.opt_state, other.good))


def test_a_loss_without_a_finite_gradient_is_skipped_too():
    model = tiny_model(1)
    lora = overflowing(random_lora(model, target_modules=["o_proj"]))
    state, frozen, step = start(model, lora, TrainingSection(**SETTINGS))
    state = step(state, frozen, accumulated(good_rows(), 1))
    assert int(state.skips.total) == 1
    same(state.trainable["lora"], lora)


def test_float16_that_overflows_is_skipped():
    model = tiny_model(1, jnp.float16, initializer_range=60.0)
    state, frozen, step = start(model, random_lora(model), TrainingSection(**SETTINGS))
    kept = jax.tree.map(np.array, state.trainable)
    state = step(state, frozen, accumulated(good_rows(), 1))
    assert int(state.skips.total) == 1
    same(state.trainable, kept)


def test_after_too_many_in_a_row_no_step_is_taken():
    model = poisoned(tiny_model(1))
    state, frozen, step = start(model, random_lora(model), TrainingSection(**SETTINGS, max_skipped_steps=1))
    good, bad = accumulated(good_rows(), 1), accumulated(bad_rows(), 1)
    for batch in (good, bad, bad):
        state = step(state, frozen, batch)
    kept = jax.tree.map(np.array, state.trainable)
    for batch in (good, bad):  # which the host hands over before it looks
        state = step(state, frozen, batch)
    same(state.trainable, kept)
    skips = jax.device_get(state.skips)
    assert (int(skips.in_a_row), skips.since(0)) == (2, [1, 2])
    assert (skips.taken(5), skips.last_taken(5)) == (1, 0)


def test_of_many_skipped_steps_the_last_ones_are_known():
    model = poisoned(tiny_model(1))
    state, frozen, step = start(model, random_lora(model), TrainingSection(**SETTINGS, max_skipped_steps=99))
    for batch in [good_rows(), *[bad_rows()] * 11]:
        state = step(state, frozen, accumulated(batch, 1))
    skips = jax.device_get(state.skips)
    assert skips.since(0) == list(range(4, 12))
    assert skips.since(10) == [11]
    assert skips.taken(12) == 1


# Where it comes from.


@pytest.fixture(scope="module")
def model():
    return tiny_model(2)


# Whole runs.


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    """Rows of which the fourth has a letter whose embedding is not finite."""
    return poison(write_inputs(tmp_path_factory.mktemp("nonfinite")))


def settings(**training):
    return {"training": {"eval_strategy": "no", "eval_steps": None, "save_strategy": "no", **training}}


def adapter_of(folder: Path) -> dict[str, np.ndarray]:
    return load_file(folder / "adapter" / "adapter_model.safetensors")


def test_a_resumed_run_keeps_the_counts(inputs, monkeypatch, capsys):
    like = {
        "logging_steps": 4,
        "save_strategy": "steps",
        "save_steps": 3,
        "max_steps": 8,
        "lr_scheduler_type": "linear",
    }
    data = {"packing": False, "shuffle": False, "eval": None}  # row 4 is in every fourth step, from the first on
    whole, cut = (run_config(inputs, name, data=data, **settings(**like)) for name in ("whole", "cut"))
    train(whole)
    cut_off(cut, 5, monkeypatch)
    train(run_config(inputs, "cut", data=data, **settings(**like, resume_from_checkpoint=True)))
    names = ("step", "loss", "skipped", "learning_rate", "target_tokens")
    one, other = ([[row.get(name) for name in names] for row in metrics(inputs / name)] for name in ("whole", "cut"))
    assert one == other
    assert [row["skipped"] for row in metrics(inputs / "whole")] == [1, 2]
    same(adapter_of(inputs / "whole"), adapter_of(inputs / "cut"))
    assert "warning: step 1 was skipped" in capsys.readouterr().out
    # Six steps were taken, and the schedule went no further.
    assert metrics(inputs / "whole")[-1]["learning_rate"] == pytest.approx(1e-2 * (1 - 4 / 7))


def test_a_broken_base_stops_the_run_and_is_named(inputs, tmp_path, capsys):
    write_inputs(tmp_path)
    plant(tmp_path / "base", "model.layers.0.self_attn.qkv_proj.weight", (-1, 0), 3e38)
    run = run_config(tmp_path, data={"eval": None}, **settings(logging_steps=3, debug_nans=True, max_skipped_steps=1))
    with pytest.raises(FloatingPointError, match="step 2: .*no step was taken, so there is no adapter to save"):
        train(run)
    out = capsys.readouterr().out
    assert "warning: step 1 was skipped" in out
    assert "the first that is not finite: the activations that come out of model.layers.0.self_attn.qkv_proj" in out
    assert "the loss of none of its " in out
    assert [row["skipped"] for row in metrics(tmp_path / "out")] == [2]
    assert not (tmp_path / "out" / "adapter").exists()


def test_a_run_that_diverges_leaves_the_last_good_adapter(tmp_path):
    write_inputs(tmp_path)
    like = {"optim": "sgd", "max_grad_norm": 0.0, "warmup_ratio": 0.0, "logging_steps": 2, "max_steps": 20}
    run = run_config(tmp_path, data={"eval": None}, **settings(learning_rate=1e30, **like))
    with pytest.raises(
        FloatingPointError, match=r"step 8: .*holds the adapter that step 1 started from.*learning_rate"
    ):
        train(run)
    saved = adapter_of(tmp_path / "out")
    assert all(not tensor.any() for name, tensor in saved.items() if "lora_B" in name)  # which is the start
    assert all(np.isfinite(tensor).all() for tensor in saved.values())
    # And where the run ends before that many steps: the same.
    short = run_config(
        tmp_path, "short", data={"eval": None}, **settings(learning_rate=1e30, **{**like, "max_steps": 3})
    )
    with pytest.raises(FloatingPointError, match="step 3: .*in the last 2 steps; .* that step 1 started from"):
        train(short)
    same(adapter_of(tmp_path / "short"), saved)


MESHES = """
import json, pathlib, sys
from phi3_jax.training.loop import train
from tests.helpers.mesh_runs import config
for mesh in json.loads(sys.argv[2]):
    train(config(pathlib.Path(sys.argv[1]), mesh, "_".join(map(str, mesh)), eval_strategy="no"))
"""


@pytest.mark.slow
def test_a_mesh_skips_the_same_steps(tmp_path):
    write_mesh_inputs(tmp_path)
    poison(tmp_path)
    flags = "--xla_force_host_platform_device_count=4 --xla_cpu_multi_thread_eigen=false"
    meshes = [[1, 1, 1, 1], [1, 2, 2, 1]]
    done = subprocess.run(
        [sys.executable, "-c", MESHES, str(tmp_path), json.dumps(meshes)],
        env={**os.environ, "XLA_FLAGS": flags},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    one, four = (metrics(tmp_path / name) for name in ("1_1_1_1", "1_2_2_1"))
    assert one[-1]["skipped"] > 0
    assert [row.get("skipped") for row in one] == [row.get("skipped") for row in four]
    assert ["loss" in row for row in one] == ["loss" in row for row in four]
    np.testing.assert_allclose(
        [row["loss"] for row in four if "loss" in row], [row["loss"] for row in one if "loss" in row], rtol=0, atol=1e-5
    )
    warnings = [line for line in done.stdout.splitlines() if line.startswith("warning: step")]
    assert warnings[: len(warnings) // 2] == warnings[len(warnings) // 2 :]
    assert all("chats.jsonl, row 4 (" in warning for warning in warnings)
