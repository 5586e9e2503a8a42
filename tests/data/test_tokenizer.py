"""What this package needs of a tokenizer, transformers' have."""

from phi3_jax.data.tokenizer import Tokenizer
from tests.helpers.tokenizers import JULY, PHI_4, phi3_tokenizer, phi4_tokenizer


def test_the_tokenizers_of_the_family_have_all_of_it():
    names = {name for name in vars(Tokenizer) if not name.startswith("_")} | set(Tokenizer.__annotations__)
    assert names > {"chat_template", "eos_token_id"}
    for tokenizer in (phi3_tokenizer(JULY), phi4_tokenizer(PHI_4)):
        assert [name for name in sorted(names) if not hasattr(tokenizer, name)] == []
