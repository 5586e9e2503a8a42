"""What the section of training says of itself."""

import pytest

from phi3_jax import InputError
from phi3_jax.config.training import TrainingSection


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"max_steps": 0}, "training.max_steps is 0, expected at least 1, or -1 to train by epochs"),
        ({"num_train_epochs": 0}, "training.num_train_epochs is 0 and training.max_steps -1: nothing to train"),
        ({"loraplus_lr_embedding": 1e-5}, "training.loraplus_lr_embedding is 1e-05, but without LoRA"),
        ({"loraplus_lr_ratio": 16, "optim": "lorafa"}, "training.loraplus_lr_ratio is 16, but training.optim lorafa"),
    ],
)
def test_what_cannot_be_is_refused_with_both_names(values, message):
    with pytest.raises(InputError, match=message):
        TrainingSection(**values)
