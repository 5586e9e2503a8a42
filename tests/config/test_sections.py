"""A run's sections: what they say of themselves."""

import pytest

from phi3_jax import InputError
from phi3_jax.config.sections import DataSection


def test_rows_to_train_on_are_given_or_asked_for():
    assert DataSection(train="rows.jsonl").require_train() == "rows.jsonl"
    with pytest.raises(InputError, match="data.train is not set; name a file"):
        DataSection().require_train()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"max_length": None}, "data.max_length is null, but data.packing fills .* set data.packing false"),
        ({"max_length": None, "packing": False, "eval_packing": True}, "is null, but data.eval_packing fills"),
        ({"max_length": None, "packing": False, "streaming": True}, "is null, but of rows that are streamed nobody"),
        ({"packing_strategy": "bfd", "truncation_mode": "keep_end"}, "keep_end, but data.packing_strategy bfd never"),
        ({"packing_strategy": "wrapped", "streaming": True}, "data.packing_strategy is wrapped, but .* give best_fit"),
        ({"eval": {}}, "data.eval is {}, expected a source, or names with a source each"),
        ({"eval": {" ": "a.jsonl"}}, "data.eval: ' ' is no name"),
        ({"eval": {"chats": " "}}, "data.eval.chats is ' ', expected a file"),
    ],
)
def test_settings_of_rows_that_contradict_each_other_are_told(given, message):
    with pytest.raises(InputError, match=message):
        DataSection(**given)


def test_what_packing_never_looks_at_may_be_there_without_it():
    data = DataSection(max_length=None, packing=False, packing_strategy="bfd", truncation_mode="keep_end")
    with pytest.raises(InputError, match="data.max_length is null, so that"):
        data.limit  # noqa: B018
    assert not data.cuts
    held_out = DataSection(packing_strategy="wrapped", eval_packing=False).evaluation
    assert (held_out.packing, held_out.cuts, DataSection(packing_strategy="wrapped").cuts) == (False, True, False)
