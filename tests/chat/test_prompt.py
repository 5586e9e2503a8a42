"""Messages on their way to the model."""

import pytest

from phi3_jax import InputError
from tests.helpers.conversations import Model, silent, start
from tests.helpers.tokenizers import APRIL, phi3_tokenizer


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> Model:
    return Model(monkeypatch, positions=100)


def test_a_template_without_the_role_is_told(model):
    tokenizer = phi3_tokenizer(APRIL)
    with pytest.raises(InputError, match="the model's chat template has no system role"):
        start(model, tokenizer, system="Be brief.")
    session = start(model, tokenizer)
    with pytest.raises(InputError, match="no system role"):
        session.set_system("Be brief.")
    session.say("one", silent)
    assert session.system is None
    with pytest.raises(InputError, match="no chat template"):
        start(model, phi3_tokenizer(None))
