"""Sizes are rounded up to few."""

from phi3_jax.system.buckets import bucket, power


def test_buckets_of_prompts_waste_less_the_longer_they_are():
    lengths = range(1, 20_000)
    buckets = [bucket(length) for length in lengths]
    assert all(size >= length for size, length in zip(buckets, lengths, strict=True))
    assert all(size == bucket(size) for size in buckets)
    assert len(set(buckets)) < 50
    assert [bucket(n) for n in (1, 16, 17, 64, 65, 512, 513, 4096, 4097)] == [
        *(16, 16, 32, 64, 128, 512, 768, 4096, 5120),
    ]


def test_powers():
    assert [power(n) for n in (0, 1, 2, 3, 1024, 1025)] == [1, 1, 2, 4, 1024, 2048]
    assert [power(n, 4) for n in (1, 2, 16, 17)] == [1, 4, 16, 64]
