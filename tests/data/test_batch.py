"""What the pipeline makes is a batch: names and shapes as the type says them."""

import numpy as np

from phi3_jax.config.sections import DataSection
from phi3_jax.data import train_batches
from tests.helpers.distributed_inputs import BATCHES, rows


def test_every_array_of_a_batch_has_one_shape():
    batch = next(train_batches(rows(), DataSection(packing=False, max_length=256), **BATCHES))
    assert set(batch) >= {"input_ids", "positions", "segment_ids", "loss_mask"}
    accumulation, size, seq = batch["input_ids"].shape
    assert (accumulation, size) == (2, 4)
    for name, array in batch.items():
        assert array.shape == (accumulation, size, seq), name
        assert np.issubdtype(array.dtype, np.integer), name
