"""What a step keeps in memory."""

import pytest

from phi3_jax.performance.memory import Estimator, state_bytes
from phi3_jax.performance.topology import abstract_mesh, parse_topology
from phi3_jax.training.abstract import abstract_step
from tests.helpers.plans import MINI, SMALL, run_of


def held(topology, **sections):
    """Bytes of weights, adapter and optimizer on a device, of Phi-3-mini; nothing is traced."""
    run, config = run_of(MINI, **sections)
    return state_bytes(abstract_step(run, config, abstract_mesh(run, parse_topology(topology))))


@pytest.mark.parametrize(
    ("axes", "weights", "adapter"),
    [
        ({"fsdp": 4}, 0.25, 0.25),
        ({"tensor": 4}, 0.25, 1),
        ({"data": 4}, 1, 1),
        ({"fsdp": 2, "context": 2}, 0.25, 0.25),
    ],
)
def test_what_devices_share(axes, weights, adapter):
    kinds = held("gpu:a100:4", parallel=axes)
    norms = 2 * (2 * 32 + 1) * 3072  # which are whole everywhere
    assert kinds["weights"] == (2 * 3_821_079_552 - norms) * weights + norms
    assert kinds["adapter"] == 4 * 25_165_824 * adapter
    assert kinds["optimizer"] == pytest.approx(8 * 25_165_824 * adapter, abs=100)


def test_nf4_takes_half_a_byte_and_its_statistics():
    quantised = 32 * (9216 * 3072 + 3072 * 3072 + 3 * 8192 * 3072)
    rest = 3_821_079_552 - quantised
    statistics = quantised // 64 + 4 * quantised // (64 * 256) + 4 * 4 * 32
    kinds = held("gpu:l4", model={"quantization": "nf4"})
    assert kinds["weights"] == quantised // 2 + statistics + 2 * rest


def test_full_fine_tuning_keeps_weights_and_moments_in_float32():
    kinds = held("gpu:h200", peft={"full_finetuning": True})
    assert kinds["weights"] == 4 * 3_821_079_552
    assert kinds["adapter"] == 0
    assert kinds["optimizer"] == pytest.approx(8 * 3_821_079_552, abs=100)


def test_policies_keep_less_and_less():
    sizes = {}
    for policy in ("none", "dots", "attention", "full", "offload"):
        run, config = run_of(SMALL, data={"max_length": 512}, training={"remat_policy": policy})
        sizes[policy] = Estimator(config)(run, parse_topology("gpu:l4"))
    kept = [memory.activations for memory in sizes.values()]
    assert kept == sorted(kept, reverse=True)
    assert len(set(kept)) == len(kept)
    tokens = 4 * 512
    assert sizes["full"].activations == 4 * tokens * 256 * 2
    # Beside each layer's input, attention's output and a float32 for each head.
    assert sizes["attention"].activations - sizes["full"].activations == 4 * tokens * (256 * 2 + 4 * 4)
    assert sizes["offload"].host == sizes["full"].activations
