"""Adapters of slices as one of the fused layer."""

from dataclasses import replace

import numpy as np
import pytest

from phi3_jax import InputError
from phi3_jax.lora import DoraLinear, LoraLinear
from phi3_jax.lora.fused import find_blocks, fits, fused, slice_table, split
from phi3_jax.lora.stack import stacked, unstacked
from phi3_jax.lora.tree import Slice

ROWS = {"q_proj": (0, 4), "k_proj": (4, 6), "v_proj": (6, 8)}
Q, K, V = (Slice("qkv_proj", *rows, 8, name) for name, rows in ROWS.items())


def lora(rows: Slice, r: int = 2, scaling: float = 2.0, **fields: np.ndarray) -> LoraLinear:
    random = np.random.default_rng([rows.start, r])
    a, b = (random.normal(size=shape).astype(np.float32) for shape in ((r, 5), (rows.stop - rows.start, r)))
    return LoraLinear(a, b, scaling, **fields)


def dora(rows: Slice, r: int = 2) -> DoraLinear:
    plain = lora(rows, r)
    return DoraLinear(plain.lora_A, plain.lora_B, np.arange(1.0 + rows.start, 1 + rows.stop, dtype=np.float32), 2.0)


def test_slices_of_a_model(tiny):
    """4 heads of 4 and 2 key-value heads; the two halves of the MLP."""
    table = slice_table(tiny())
    assert {name.rpartition(".")[2]: tuple(part)[1:4] for name, part in table.items()} == {
        "gate_proj": (0, 28, 56),
        "up_proj": (28, 56, 56),
        "q_proj": (0, 16, 32),
        "k_proj": (16, 24, 32),
        "v_proj": (24, 32, 32),
    }
    assert {part.parent for part in table.values()} == {
        "model.layers.self_attn.qkv_proj",
        "model.layers.mlp.gate_up_proj",
    }


def test_stacked_is_the_reverse_of_unstacked():
    """Layers of a kind together, in whatever order they come."""
    layers = {2: lora(Q, 2), 0: lora(Q, 1), 3: lora(Q, 1), 1: lora(Q, 1, 3.0)}
    adapter = stacked(layers, 5)
    assert (adapter.layers, adapter.num_layers) == (((0, 3), (1,), (2,)), 5)
    for layer, one in unstacked(adapter):
        assert one.scaling == layers[layer].scaling
        np.testing.assert_array_equal(one.lora_B, layers[layer].lora_B)
    alike = stacked({1: lora(Q), 0: lora(Q)}, 2)
    assert alike.lora_A.shape == (2, 2, 5)


def test_each_slice_gets_its_own_update_and_the_others_none():
    parts = [(V, lora(V, 3, 0.5)), (Q, lora(Q, 1))]  # in no order, of unequal rank and scale
    whole = fused(parts)
    assert whole.lora_A.shape == (4, 5)
    delta = whole.scaling * whole.lora_B @ whole.lora_A
    np.testing.assert_allclose(delta[:4], 2.0 * parts[1][1].lora_B @ parts[1][1].lora_A, rtol=1e-6)
    np.testing.assert_array_equal(delta[4:6], 0)
    np.testing.assert_allclose(delta[6:], 0.5 * parts[0][1].lora_B @ parts[0][1].lora_A, rtol=1e-6)


def test_parted_is_the_reverse_to_the_last_bit():
    # Thousands of numbers: many of them have another last bit than the quotient.
    parts = [(Q, lora(Q, 999, 5 / 3)), (K, lora(K, 1, 7 / 3, lora_bias=np.float32([0.1, 0.3]))), (V, lora(V, 999, 0.7))]
    whole = fused(parts)
    back = split(whole, [(rows, one.rank, one.scaling) for rows, one in parts])
    for (_, one), again in zip(parts, back, strict=True):
        assert again.scaling == one.scaling
        np.testing.assert_allclose(again.lora_B, one.lora_B, rtol=1.2e-7)
    # What was multiplied and divided may have another last bit; multiplied again it is the same.
    again = fused([(rows, part) for (rows, _), part in zip(parts, back, strict=True)])
    for field in ("lora_A", "lora_B", "lora_bias"):
        np.testing.assert_array_equal(getattr(again, field), getattr(whole, field))


def test_a_scale_of_zero():
    parts = [(Q, lora(Q, 1, 0.0)), (V, lora(V, 1, 0.0))]
    np.testing.assert_array_equal(fused(parts).lora_B[:4, :1], parts[0][1].lora_B)
    whole = fused([(Q, lora(Q, 1, 0.0)), (V, lora(V, 1, 2.0))])
    assert np.isfinite(whole.lora_B).all()
    np.testing.assert_array_equal(whole.lora_B[:4], 0)


def test_dora_needs_all_the_rows():
    whole = fused([(Q, dora(Q)), (K, dora(K)), (V, dora(V))])
    np.testing.assert_array_equal(whole.magnitude, np.arange(1, 9))
    with pytest.raises(InputError, match="magnitude for every row"):
        fused([(Q, dora(Q)), (V, dora(V))])


def test_blocks_are_found_by_the_form_of_b():
    layers = [fused([(Q, lora(Q, 2)), (V, lora(V, 1))]), fused([(Q, lora(Q, 2)), (V, lora(V, 1))])]
    assert find_blocks(layers, [Q, K, V]) == [(Q, 2), (V, 1)]
    # A column that is zero in one layer is told by the other.
    b = np.array(layers[0].lora_B)
    b[:, 1] = 0
    assert find_blocks([replace(layers[0], lora_B=b), layers[1]], [Q, K, V]) == [(Q, 2), (V, 1)]
    assert find_blocks([replace(layers[0], lora_B=b)], [Q, K, V]) is None


def test_dense_and_fresh_adapters_are_not_made_of_slices():
    whole = Slice("qkv_proj", 0, 8, 8, "qkv_proj")
    dense = lora(whole, 3)
    assert find_blocks([dense], [Q, K, V]) is None
    assert find_blocks([replace(dense, lora_B=np.zeros_like(dense.lora_B))], [Q, K, V]) is None
    # One number outside its block, in one layer of two.
    blocks = fused([(Q, lora(Q, 2)), (V, lora(V, 1))])
    b = np.array(blocks.lora_B)
    b[5, 0] = 1e-30
    assert find_blocks([blocks, replace(blocks, lora_B=b)], [Q, K, V]) is None
    # Columns of slices in another order than the rows: saved again they would be in another order, too.
    turned = replace(blocks, lora_A=blocks.lora_A[::-1], lora_B=blocks.lora_B[:, ::-1])
    assert find_blocks([turned], [Q, K, V]) is None


def test_bias_and_magnitude_of_rows_without_an_adapter():
    bias = np.zeros(8, np.float32)
    blocks = replace(fused([(Q, lora(Q, 2)), (V, lora(V, 1))]), lora_bias=bias)
    assert find_blocks([blocks], [Q, K, V]) == [(Q, 2), (V, 1)]
    bias[5] = 1
    assert find_blocks([blocks], [Q, K, V]) is None
    with_magnitude = DoraLinear(blocks.lora_A, blocks.lora_B, np.ones(8, np.float32), 2.0)
    assert find_blocks([with_magnitude], [Q, K, V]) is None
    assert find_blocks([fused([(Q, dora(Q)), (K, dora(K)), (V, dora(V))])], [Q, K, V]) == [(Q, 2), (K, 2), (V, 2)]


def test_whether_given_blocks_fit():
    blocks = fused([(Q, lora(Q, 2)), (V, lora(V, 1))])
    assert fits(blocks, [(Q, 2), (V, 1)])
    assert not fits(blocks, [(Q, 1), (V, 2)])
    assert not fits(blocks, [(Q, 2), (V, 2)])
    assert not fits(blocks, [(Q, 3)])
