"""Rows with their targets marked."""

from phi3_jax.data import prepare_data, preview
from phi3_jax.data.preview import mark, runs
from tests.helpers.tokenizers import JULY, phi3_tokenizer, phi4_mini_tokenizer


def test_a_preview_is_one_short_line_that_cannot_steer_a_terminal(chats):
    data = chats({"prompt": "a\x1b[2J\nb", "completion": "c " * 40}, max_length=256)
    tokenizer = phi3_tokenizer(JULY)
    rows = prepare_data(data, tokenizer, seed=0).train
    whole = preview(rows, tokenizer, tokens=1000)
    assert whole.isprintable()
    assert "⏎" in whole
    assert preview(rows, tokenizer, tokens=12).endswith(" …")
    assert whole.startswith(preview(rows, tokenizer, tokens=5).removesuffix(" …")[:5])


def test_of_long_stretches_the_middle_is_left_out_and_no_target_is_hidden(chats):
    turns = [("user", "0123456789" * 9), ("assistant", "yes"), ("user", "x"), ("assistant", "abcdefghij" * 9)]
    data = chats({"messages": [{"role": role, "content": content} for role, content in turns]}, max_length=256)
    tokenizer = phi3_tokenizer(JULY)
    rows = prepare_data(data, tokenizer, seed=0).train
    assert mark(runs(rows, tokenizer, 0, tokens=256)) == preview(rows, tokenizer, 0, tokens=256)
    question, answer, between, long, _ = runs(rows, tokenizer, 0, tokens=20)
    assert answer == (True, "yes<|end|>")
    assert between[0] is False
    assert "<|user|>" in between[1]
    for _, text in (question, long):
        assert " tokens … " in text
        assert len(text) < 70
    assert question[1].startswith("<|user|>")
    assert question[1].endswith("<|assistant|>")
    assert long[0] is True
    assert long[1].startswith("abc")
    assert long[1].endswith("<|end|>")


def test_letters_that_look_like_a_special_token_have_a_backslash(chats):
    tokenizer = phi4_mini_tokenizer()
    rows = prepare_data(chats({"prompt": "is <|user|> a token?", "completion": "Yes."}), tokenizer, seed=0).train
    assert preview(rows, tokenizer) == ("<|user|>is \\<|user|> a token?<|end|><|assistant|>⟦Yes.<|end|>⟧<|endoftext|>")
