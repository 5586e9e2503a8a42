import pytest

from phi3_jax.model.blocks import SPLASH_BLOCK, even_block, splash_block


@pytest.mark.parametrize("length", [1, 7, 255, 256, 257, 300, 511, 513, 1000, 4096, 131_072])
@pytest.mark.parametrize("largest", [256, 512])
def test_blocks_are_as_few_as_can_be_and_even(length, largest):
    size = even_block(length, largest)
    blocks = -(-length // size)
    assert size <= largest
    assert blocks == -(-length // largest)
    assert blocks * size - length < 8 * blocks


@pytest.mark.parametrize("length", [SPLASH_BLOCK * n for n in range(1, 33)])
def test_splash_attention_has_nothing_to_fill_up(length):
    size = splash_block(length)
    assert length % size == size % SPLASH_BLOCK == 0
    assert not any(length % larger == 0 for larger in range(size + SPLASH_BLOCK, 1025, SPLASH_BLOCK))
