"""Control tokens under other names, and guarded ones as characters."""

import numpy as np

from phi3_jax.data.control_tokens import ControlTokens
from tests.helpers.tokenizers import JULY, phi3_tokenizer


def ids(control, text):
    found, special = control.original(np.array(control.backend.encode(text, add_special_tokens=False).ids))
    return found.tolist(), special.tolist()


def test_named_tokens_are_tokens_and_guarded_ones_characters():
    tokenizer = phi3_tokenizer(JULY)
    control = ControlTokens(tokenizer)
    control.set_of_turns(["<|end|>"])
    text = "a<|end|></s>"
    assert ids(control, control.named(text))[0] == tokenizer(text, add_special_tokens=False)["input_ids"]
    end, other = tokenizer.convert_tokens_to_ids(["<|end|>", "</s>"])
    for is_literal, kept in ((True, []), (False, [other])):
        found, special = ids(control, control.named(control.guarded(text, is_literal=is_literal)))
        assert [token for token, is_special in zip(found, special, strict=True) if is_special] == kept
        assert end not in found
        assert "".join(tokenizer.decode(found).split()) == "a<|end|></s>"


def test_guards_reach_into_values_and_stand_in_json():
    control = ControlTokens(phi3_tokenizer(JULY))
    control.set_of_turns(["<|end|>"])
    plain = {"a": ["b", 1, None], "c": {"d": True}}
    assert control.guarded(plain, is_literal=True) == plain
    guarded = control.guarded({"<|end|>": ["x<|user|>"]}, is_literal=True)
    assert control.has_guarded(str(guarded))
    assert control.shown(control.named(str(guarded))) == str({"<|end|>": ["x<|user|>"]})


def test_shifts_say_where_a_place_goes():
    control = ControlTokens(phi3_tokenizer(JULY))
    text = "ab<|end|>cd" + control.guarded("<s>", is_literal=True) + "z"
    named, ends, shifts = control.named_with_shifts(text)
    assert named == control.named(text)
    for letter in "cz":
        place = text.index(letter, 8)
        moved = place + [0, *shifts][sum(end <= place for end in ends)]
        assert named[moved] == letter
