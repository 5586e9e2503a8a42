"""Cards as XLA's compiler knows them."""

import pytest

from phi3_jax.performance.gpu_targets import compute_capability, target_config
from phi3_jax.performance.topology import GPUS


def test_every_card_that_plan_names_can_be_compiled_for():
    for name, kind in GPUS.items():
        text = target_config(kind)
        assert text is not None, name
        assert f'device_description_str: "{kind}"' in text
        assert text.count("{") == text.count("}")


@pytest.mark.parametrize(
    ("kind", "lines"),
    [  # as openxla/xla has them, read from the cards
        ("NVIDIA A100-SXM4-80GB", ("shared_memory_per_core: 167936", "optin: 166912", "core_count: 108", "lanes: 64")),
        ("NVIDIA RTX A6000", ("shared_memory_per_core: 102400", "optin: 101376", "core_count: 84", "lanes: 128")),
        ("NVIDIA H100 PCIe", ("shared_memory_per_core: 233472", "optin: 232448", "core_count: 114", "lanes: 128")),
    ],
)
def test_what_a_capability_has(kind, lines):
    text = target_config(kind).replace("fpus_per_core", "lanes")
    assert all(line in text for line in lines)


def test_of_other_cards_nothing_is_made_up():
    assert target_config("NVIDIA GeForce RTX 4070") is None
    assert compute_capability("NVIDIA GeForce RTX 4070") is None
