"""What a batch is, for everything that takes one."""

from collections.abc import Mapping

import numpy as np
from jaxtyping import Array, Int

# What training gives the model, in this order.
TRAINING_KEYS = ("input_ids", "positions", "segment_ids", "loss_mask")

# `input_ids` `[batch, seq]` and what else of `attention_mask`, `segment_ids`, `positions`, `loss_mask` and
# `labels` applies, of the same shape; with a leading `accumulation` axis where micro-batches are stacked.
Batch = Mapping[str, Int[Array, "*accumulation batch seq"] | Int[np.ndarray, "*accumulation batch seq"]]
# The same in this process's memory, as the pipeline makes it.
HostBatch = dict[str, Int[np.ndarray, "*accumulation batch seq"]]
# The same on the devices.
DeviceBatch = dict[str, Int[Array, "*accumulation batch seq"]]
