"""A model given by its shape."""

import pytest

from tests.helpers.benchmarks import seen_by_command


@pytest.mark.parametrize(
    ("hidden", "heads", "intermediate"),
    [(3072, 32, 8192), (512, 8, 1344), (64, 1, 192), (96, 1, 256), (5120, 64, 13632)],
)
def test_shapes_have_phi3_minis_proportions(monkeypatch, capsys, hidden, heads, intermediate):
    _, config, _ = seen_by_command(monkeypatch, capsys, "--hidden", str(hidden))
    assert (config.num_attention_heads, config.intermediate_size) == (heads, intermediate)
    assert (config.head_dim, config.num_key_value_heads, config.vocab_size) == (hidden // heads, heads, 32064)
