"""Chat data: files or hub data sets in, batches with loss masks out."""

from phi3_jax.data.pipeline import Batches, eval_batches, train_batches
from phi3_jax.data.prepare import PreparedData, prepare_data
from phi3_jax.data.preview import preview
from phi3_jax.data.rows import DataStats, TokenizedRows

__all__ = [
    "Batches",
    "DataStats",
    "PreparedData",
    "TokenizedRows",
    "eval_batches",
    "prepare_data",
    "preview",
    "train_batches",
]
