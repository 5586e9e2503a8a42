"""A run's sections: what they say of themselves."""

import pytest

from phi3_jax import InputError
from phi3_jax.config.sections import DataSection


def test_rows_to_train_on_are_given_or_asked_for():
    assert DataSection(train="rows.jsonl").require_train() == "rows.jsonl"
    with pytest.raises(InputError, match="data.train is not set; name a file"):
        DataSection().require_train()
