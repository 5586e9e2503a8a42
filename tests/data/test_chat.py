"""Rendering, tokenisation and the places of targets, with small tokenizers of every kind."""

import re
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from phi3_jax.data.chat import ChatTokenizer
from phi3_jax.data.formats import Conversation, Prerendered, Turn
from phi3_jax.data.row_tokenizer import target_mask
from phi3_jax.system.errors import InputError
from tests.helpers.tokenizers import APRIL, JULY, PHI_3_TOKENS, PHI_4_TOKENS, phi3_tokenizer, phi4_tokenizer, templates

TOKENIZERS = templates()
CHATS = {name: ChatTokenizer(tokenizer) for name, tokenizer in TOKENIZERS.items()}
END = {name: "<|im_end|>" if name == "phi-4" else "<|end|>" for name in TOKENIZERS}
MARKERS = [*PHI_3_TOKENS, *PHI_4_TOKENS, "<s>", "</s>", "<unk>"]

# Ordinary text: no special token, and not the characters that a sentencepiece decoder cannot
# tell from a blank (▁) or that Python and Rust do not agree to be blanks (control characters).
# Tokens that neither open nor close turns in every template here: in an answer they are what they seem.
OTHERS = re.compile("<s>|</s>|<unk>|" + re.escape("<|system|>") + "|" + re.escape("<|endoftext|>"))
words = st.text(
    st.characters(exclude_categories=("Cc", "Cs", "Zs", "Zl", "Zp", "Cf"), exclude_characters="▁<|>"), min_size=1
)
texts = st.lists(st.one_of(words, st.sampled_from([" ", "\n", "  ", "the 12 hen", "<", "|>"])), min_size=1).map("".join)
nonblank = texts.filter(lambda text: text.strip())


def conversations(content: st.SearchStrategy[str]) -> st.SearchStrategy[list[Turn]]:
    pairs = st.lists(st.tuples(content, content), min_size=1, max_size=3)
    return pairs.map(
        lambda pairs: [turn for user, answer in pairs for turn in (Turn("user", user), Turn("assistant", answer))]
    )


def encode(name, turns):
    chat = CHATS[name]
    document = chat.render(Conversation(tuple(turns)), "row 1")
    return document, chat.encode([document])[0]


def target_texts(name, turns, loss_on="assistant"):
    document, encoded = encode(name, turns)
    mask = target_mask(encoded, document, loss_on)
    runs, tokenizer = [], TOKENIZERS[name]
    for index, is_target in enumerate(mask):
        if is_target and not mask[index - 1]:
            runs.append([])
        if is_target:
            runs[-1].append(encoded.ids[index])
    return [tokenizer.decode(run, skip_special_tokens=False) for run in runs]


def rendered_by_transformers(name, turns):
    messages = [{"role": turn.role, "content": turn.content} for turn in turns]
    return TOKENIZERS[name].apply_chat_template(messages, tokenize=False)


@pytest.mark.parametrize("name", TOKENIZERS)
@given(turns=conversations(nonblank))
@settings(max_examples=40, deadline=None)
def test_ordinary_text_gets_the_tokenizers_own_ids(name, turns):
    expected = TOKENIZERS[name](rendered_by_transformers(name, turns), add_special_tokens=False)["input_ids"]
    assert encode(name, turns)[1].ids.tolist() == expected


@pytest.mark.parametrize("name", TOKENIZERS)
@given(turns=conversations(nonblank))
@settings(max_examples=40, deadline=None)
def test_targets_are_the_answers_and_their_end_tokens(name, turns):
    answers = [turn.content for turn in turns if turn.role == "assistant"]
    if name.startswith("phi-4"):
        expected = [answer + END[name] for answer in answers]
    elif name == "trimming":
        expected = [answer.strip() + " <|end|>" for answer in answers]
    else:
        # `<|assistant|>` swallows the blanks after it, those of the answer too.
        expected = [answer.lstrip() + END[name] for answer in answers]
    assert target_texts(name, turns) == expected
    assert target_texts(name, turns, "last") == expected[-1:]


@pytest.mark.parametrize("name", TOKENIZERS)
@given(turns=conversations(st.lists(st.sampled_from([*MARKERS, "a", "\n", " "]), min_size=1).map("".join)))
@settings(max_examples=40, deadline=None)
def test_no_content_can_write_special_tokens(name, turns):
    """However many markers the contents hold, the document has those of a harmless conversation."""
    turns = [Turn(turn.role, "x" + turn.content) for turn in turns]
    turns = [turn if turn.role == "user" else replace(turn, content=OTHERS.sub("x", turn.content)) for turn in turns]
    harmless = [Turn(turn.role, "x") for turn in turns]
    special = set(TOKENIZERS[name].convert_tokens_to_ids([*TOKENIZERS[name].get_added_vocab()]))
    expected = [token for token in encode(name, harmless)[1].ids if token in special]
    assert [token for token in encode(name, turns)[1].ids if token in special] == expected
    answers = [turn.content for turn in turns if turn.role == "assistant"]
    for target, answer in zip(target_texts(name, turns), answers, strict=True):
        assert target.replace(" ", "").startswith(answer.replace(" ", "").rstrip())


def test_the_wording_of_each_template():
    turns = [Turn("user", "u"), Turn("assistant", "a")]
    decoded = {name: TOKENIZERS[name].decode(encode(name, turns)[1].ids) for name in TOKENIZERS}
    assert decoded["april"].replace(" ", "") == "<s><|user|>u<|end|><|assistant|>a<|end|>"
    assert decoded["july"].replace(" ", "") == "<|user|>u<|end|><|assistant|>a<|end|><|endoftext|>"
    assert decoded["phi-4"] == "<|im_start|>user<|im_sep|>u<|im_end|><|im_start|>assistant<|im_sep|>a<|im_end|>"


@pytest.mark.parametrize("name", TOKENIZERS)
def test_exactly_one_bos_where_the_template_writes_one_or_text_of_its_own_wants_one(name):
    ids = encode(name, [Turn("user", "u"), Turn("assistant", "a")])[1].ids.tolist()
    if not name.startswith("phi-4"):
        assert ids.count(1) == (ids[0] == 1) == name.startswith("april")
        wants = name.startswith("april") or "add_bos" in name
        pre_rendered = CHATS[name].render(Prerendered("<|user|>\nu<|end|>\n<|assistant|>\na<|end|>"), "row 1")
        assert CHATS[name].encode([pre_rendered])[0].ids.tolist().count(1) == wants
        with_bos = CHATS[name].render(Prerendered("<s><|user|>\nu<|end|>\n<|assistant|>\na<|end|>"), "row 1")
        assert CHATS[name].encode([with_bos])[0].ids.tolist().count(1) == 1


def test_all_tokens_but_the_first_are_targets_of_all():
    document, encoded = encode("april", [Turn("user", "u"), Turn("assistant", "a")])
    assert target_mask(encoded, document, "all").tolist() == [False] + [True] * (len(encoded.ids) - 1)


def test_a_dropped_system_turn_is_counted_and_other_roles_are_refused():
    turns = [Turn("system", "s"), Turn("user", "u"), Turn("assistant", "a")]
    assert encode("april", turns)[0].dropped == 1
    assert encode("july", turns)[0].dropped == 0
    with pytest.raises(InputError, match=r"row 1, turn 2: .* no place for role 'tool'"):
        encode("july", [Turn("user", "u"), Turn("tool", "t"), Turn("assistant", "a")])


def test_a_blank_system_turn_may_be_left_out():
    turns = [Turn("system", ""), Turn("user", "u"), Turn("assistant", "a")]
    document, encoded = encode("phi-3.5", turns)
    assert document.dropped == 0
    assert encoded.ids.tolist() == encode("phi-3.5", turns[1:])[1].ids.tolist()


def test_what_a_template_refuses_is_told_with_the_row():
    with pytest.raises(
        InputError, match=r"^row 1: the chat template refuses the conversation \(roles must alternate\)$"
    ):
        encode("trimming", [Turn("user", "u"), Turn("user", "u"), Turn("assistant", "a")])


def test_a_template_that_rewrites_contents_is_an_error_where_these_cannot_be_found():
    turns = (Turn("user", "u"), Turn("assistant", "a"))
    capitals = ChatTokenizer(phi3_tokenizer(JULY.replace("message['content']", "(message['content'] | upper)")))
    assert capitals.render(Conversation(turns), "row 1").answer.content == "A"
    counts = "(message['content'] | replace('n', message['content'] | length | string))"
    chat = ChatTokenizer(phi3_tokenizer(JULY.replace("message['content']", counts)))
    with pytest.raises(InputError, match="row 1: the chat template writes the turns in such a way"):
        chat.render(Conversation((Turn("user", "up"), Turn("assistant", "an answer"))), "row 1")


def test_weight_zero_and_blank_answers_are_no_targets():
    turns = [Turn("user", "u"), Turn("assistant", "a", trained=False), Turn("user", "u"), Turn("assistant", "b")]
    assert target_texts("july", turns) == ["b<|end|>"]
    assert target_texts("july", [*turns[:3], Turn("assistant", " ")]) == []


@pytest.mark.parametrize("name", ["april", "july", "phi-3.5"])
def test_pre_rendered_turns_are_found_by_the_templates_markers(name):
    # Blanks around the markers as the Phi-3 cookbook's files have them.
    text = "<|user|>\nu <|end|>\n<|assistant|> \na <|end|>\n<|user|>\nv<|end|>\n<|assistant|>\nb"
    chat = CHATS[name]
    document = chat.render(Prerendered(text), "row 1")
    encoded = chat.encode([document])[0]
    mask = target_mask(encoded, document, "assistant")
    # The last turn is not closed: eos ends it, so that the model learns to stop.
    assert TOKENIZERS[name].decode(encoded.ids[mask]).replace(" ", "") == "a<|end|>b<|endoftext|>"


def test_pre_rendered_turns_of_phi_4():
    chat = CHATS["phi-4"]
    text = rendered_by_transformers("phi-4", [Turn("user", "u"), Turn("assistant", "the a"), Turn("user", "v")])
    document = chat.render(Prerendered(text + "b<|im_end|>"), "row 1")
    encoded = chat.encode([document])[0]
    mask = target_mask(encoded, document, "assistant")
    assert TOKENIZERS["phi-4"].decode(encoded.ids[mask]) == "the a<|im_end|>b<|im_end|>"


def test_leading_blanks_of_an_answer_are_targets_also_where_offsets_are_trimmed():
    assert target_texts("phi-4", [Turn("user", "u"), Turn("assistant", "  the hen")]) == ["  the hen<|im_end|>"]


def test_without_a_template_prompt_and_completion_are_joined():
    tokenizer = phi3_tokenizer(None, add_bos=True)
    chat = ChatTokenizer(tokenizer)
    turns = (Turn("user", "the hen?"), Turn("assistant", "12</s>"))
    document = chat.render(Conversation(turns, is_prompt_completion=True), "row 1")
    encoded = chat.encode([document])[0]
    mask = target_mask(encoded, document, "assistant")
    assert tokenizer.decode(encoded.ids) == "<s> the hen?\n12</s><|endoftext|>"
    assert tokenizer.decode(encoded.ids[mask]) == "12</s><|endoftext|>"
    assert encoded.ids[0] == 1
    assert 2 not in encoded.ids  # `</s>` in an answer is text
    with pytest.raises(InputError, match="row 1: the tokenizer has no chat template"):
        chat.render(Conversation(turns), "row 1")


def test_words_that_a_user_added_stay_words():
    tokenizer = phi3_tokenizer(JULY)
    tokenizer.add_tokens(["<molecule>"])
    chat = ChatTokenizer(tokenizer)
    document = chat.render(Conversation((Turn("user", "<molecule><|end|>"), Turn("assistant", "a"))), "row 1")
    ids = chat.encode([document])[0].ids.tolist()
    assert ids.count(tokenizer.convert_tokens_to_ids("<molecule>")) == 1
    assert ids.count(tokenizer.convert_tokens_to_ids("<|end|>")) == 2


def test_a_vocabulary_of_whole_words_cannot_forge_a_turn_either():
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel({"<unk>": 0, "<|end|>": 1, "hi": 2}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens([AddedToken("<|end|>", normalized=False)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>")
    chat = ChatTokenizer(tokenizer)
    turns = (Turn("user", "hi <|end|> hi"), Turn("assistant", "hi"))
    document = chat.render(Conversation(turns, is_prompt_completion=True), "row 1")
    with pytest.raises(InputError, match=r"row 1: holds the text '<\|end\|>'"):
        chat.encode([document])


def test_a_template_whose_turns_nothing_ends():
    plain = "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\n' }}{% endfor %}"
    assert not ChatTokenizer(phi4_tokenizer(plain)).ends_turns
    assert ChatTokenizer(phi3_tokenizer(APRIL)).ends_turns
