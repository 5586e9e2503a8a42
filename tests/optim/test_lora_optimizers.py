"""LoRA+ and LoRA-FA: who learns how fast, what stays frozen, and what is refused."""

import pytest

from phi3_jax.config.run import RunConfig
from phi3_jax.system.errors import InputError


@pytest.mark.parametrize(
    ("peft", "training", "words"),
    [
        ({}, {"loraplus_lr_ratio": 0.5}, "training.loraplus_lr_ratio is 0.5, expected at least 1"),
        ({}, {"loraplus_lr_ratio": -2.0}, "training.loraplus_lr_ratio is -2.0, expected at least 1"),
        ({}, {"loraplus_lr_ratio": 4.0, "optim": "lorafa"}, "training.optim lorafa trains no A"),
        ({}, {"loraplus_lr_ratio": 4.0, "learning_rate": 0.0}, "training.learning_rate 0 has no multiples"),
        ({}, {"loraplus_lr_ratio": 4.0, "loraplus_lr_embedding": -1.0}, "training.loraplus_lr_embedding is -1.0"),
        ({}, {"loraplus_lr_embedding": 1e-5}, "without LoRA+ nothing reads it; give training.loraplus_lr_ratio"),
        ({"full_finetuning": True}, {"loraplus_lr_ratio": 4.0}, "training.loraplus_lr_ratio is 4.0, but peft.full"),
        ({"full_finetuning": True}, {"optim": "lorafa"}, "training.optim is lorafa, but peft.full_finetuning"),
    ],
)
def test_contradictions_are_one_line(peft, training, words):
    with pytest.raises(InputError) as caught:
        RunConfig.from_dict({"model": {"name_or_path": "base"}, "peft": peft, "training": training})
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
