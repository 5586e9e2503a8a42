"""The lengths that programs of generation are compiled for."""

from phi3_jax.generation.engine import bucket


def test_buckets_hold_the_length_and_are_few():
    lengths = range(1, 10_000)
    assert all(length <= bucket(length) <= max(16, 2 * length) for length in lengths)
    assert [bucket(length) for length in (1, 17, 65, 513, 4097)] == [16, 32, 128, 768, 5120]
    assert len({bucket(length) for length in lengths}) < 40
