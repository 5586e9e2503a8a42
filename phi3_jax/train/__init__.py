"""Training: loss, optimizer, step, loop, checkpoints."""

from typing import TYPE_CHECKING, Any

from phi3_jax.train.loss import loss

if TYPE_CHECKING:
    from phi3_jax.train.loop import train

__all__ = ["loss", "train"]


def __getattr__(name: str) -> Any:
    # The loss alone needs neither data sets nor checkpoints, which take seconds to import.
    if name != "train":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from phi3_jax.train.loop import train

    return train
