"""A first run that fits: by the rows, the model and the device."""

import numpy as np
import pytest

from phi3_jax.config.sections import DataSection
from phi3_jax.data.look import RowsLook
from phi3_jax.data.rows import DataStats
from phi3_jax.hf.checkpoint import Checkpoint
from phi3_jax.performance.plan import ESTIMATE_MARGIN
from phi3_jax.performance.propose import method_of, propose
from phi3_jax.performance.topology import JAX_GPU_SHARE
from phi3_jax.system.errors import InputError
from tests.helpers.plans import MINI, SMALL, checkpoint


@pytest.fixture(scope="module")
def mini(tmp_path_factory):
    return Checkpoint.open_config(checkpoint(tmp_path_factory.mktemp("mini"), MINI))


def rows_of(count, longest, targets=20):
    lengths = np.minimum(np.linspace(longest / 2, longest, min(count, 2000)).astype(int), longest)
    return RowsLook(count, ["messages"], lengths, np.full(len(lengths), targets), DataStats(rows=count))


def proposed(base, rows, device, method="auto"):
    return propose(base, rows, device, data=DataSection(train="chats.jsonl"), method=method, output_dir="out")


@pytest.mark.parametrize(
    ("device", "quantization", "dtype"),
    [
        ("gpu:24GB", None, "bfloat16"),
        ("gpu:14GB", None, "bfloat16"),  # where without the room twice as many rows would be taken at a time
        pytest.param("gpu:8GB", "nf4", "bfloat16", marks=pytest.mark.slow),
        pytest.param("gpu:t4", None, "float16", marks=pytest.mark.slow),
    ],
)
def test_what_is_proposed_fits_with_room(mini, device, quantization, dtype):
    found = proposed(mini, rows_of(300, 200), device)
    plan = found.plan
    assert plan.memory.total * (1 + ESTIMATE_MARGIN) <= JAX_GPU_SHARE * plan.topology.hbm
    assert (plan.run.model.quantization, plan.run.model.dtype) == (quantization, dtype)
    assert not found.needs_share
    assert plan.run.data.max_length == 256


@pytest.mark.slow
def test_long_rows_are_taken_fewer_at_a_time_and_as_many_in_a_step(mini):
    short, long = (proposed(mini, rows_of(600, longest), "gpu:24GB").plan.run.training for longest in (200, 4000))
    sizes = short.per_device_train_batch_size, long.per_device_train_batch_size
    assert sizes[0] > sizes[1]
    assert sizes[0] * short.gradient_accumulation_steps == sizes[1] * long.gradient_accumulation_steps == 16


def test_few_rows_have_many_steps_and_many_share_sequences(mini):
    few, many = proposed(mini, rows_of(100, 200), "gpu:h100"), proposed(mini, rows_of(50_000, 200), "gpu:h100")
    assert few.plan.run.training.num_train_epochs * 90 / few.steps <= 3.1  # small steps
    assert few.steps >= 60
    assert (few.plan.run.data.packing, many.plan.run.data.packing) == (False, True)
    assert many.plan.run.training.num_train_epochs == 1
    assert many.plan.run.data.eval_fraction == 0.01  # 500 rows
    assert 0 < many.plan.run.training.eval_steps < many.steps


@pytest.mark.slow
def test_too_few_rows_are_not_held_out(mini):
    run = proposed(mini, rows_of(10, 100), "gpu:h100").plan.run
    assert (run.data.eval_fraction, run.training.load_best_model_at_end) == (0.0, False)


@pytest.mark.slow
def test_several_devices_have_a_row_each_and_the_axes_that_fit(mini):
    proposal = proposed(mini, rows_of(20, 100), "v5litepod-8")
    assert proposal.settings["parallel.axes"] == "auto"
    run = proposal.plan.run
    assert (run.parallel.data, run.training.per_device_train_batch_size) == (8, 1)


def test_a_small_model_learns_fast_and_saves_no_memory(tmp_path):
    base = Checkpoint.open_config(checkpoint(tmp_path / "small", SMALL))
    run = proposed(base, rows_of(300, 100), "cpu").plan.run
    assert (run.model.dtype, run.training.gradient_checkpointing, run.training.learning_rate) == (
        "float32",
        False,
        3e-3,
    )


@pytest.mark.slow
def test_a_method_that_is_asked_for_is_kept_and_jax_told_to_take_more(mini):
    found = proposed(mini, rows_of(300, 200), "gpu:12GB", "lora")
    assert found.plan.run.model.quantization is None
    assert found.needs_share
    assert proposed(mini, rows_of(300, 200), "gpu:12GB").plan.run.model.quantization == "nf4"


@pytest.mark.parametrize(
    ("device", "method"),
    [
        pytest.param("gpu:2GB", "auto", marks=pytest.mark.slow),
        pytest.param("gpu:24GB", "full", marks=pytest.mark.slow),
        ("gpu:8GB", "lora"),
    ],
)
def test_what_does_not_fit_is_one_line(mini, device, method):
    with pytest.raises(InputError, match=f"does not fit on {device}.*tokens"):
        proposed(mini, rows_of(300, 200), device, method)


def test_other_methods_are_told_which_there_are():
    with pytest.raises(InputError, match="'dora' is not known; give one of auto, lora, qlora, full"):
        method_of("dora")
