"""The whole way from files to rows with masks, with small tokenizers and with the real ones."""

import dataclasses
import json
from pathlib import Path

import datasets
import numpy as np
import pytest

from phi3_jax.config.sections import DataSection
from phi3_jax.data import prepare_data, preview
from phi3_jax.data.chat import ChatTokenizer
from phi3_jax.data.formats import Turn
from phi3_jax.data.packing import Order, plan_epoch
from phi3_jax.system.errors import InputError
from tests.helpers.tokenizers import APRIL, JULY, phi3_tokenizer, templates

PAIR = [{"role": "user", "content": "the hen"}, {"role": "assistant", "content": "12"}]


def test_rows_masks_and_statistics(chats):
    data = chats(
        {"messages": [{"role": "system", "content": "s"}, *PAIR]},
        {"messages": [*PAIR, {"role": "user", "content": "x" * 99}]},
    )
    tokenizer = phi3_tokenizer(APRIL)
    prepared = prepare_data(data, tokenizer, seed=0)
    ids, mask = prepared.train[0]
    assert (ids.dtype, mask.dtype) == (np.int32, np.uint8)
    assert preview(prepared.train, tokenizer) == "<s><|user|> the hen<|end|><|assistant|>⟦12<|end|>⟧"
    stats = prepared.stats["train"]
    assert not prepared.eval_sets
    assert json.loads(json.dumps(stats)) == stats
    assert (stats["rows"], stats["skipped"], stats["truncated"], stats["dropped_turns"]) == (2, 0, 1, 1)
    assert stats["tokens"] == sum(len(ids) for ids, _ in prepared.train) == len(prepared.train.input_ids)
    assert stats["target_tokens"] == sum(mask.sum() for _, mask in prepared.train)
    assert stats["longest"] > 64 == max(prepared.train.lengths)
    assert stats["packing_efficiency"] == stats["tokens"] / (2 * 64)
    short = len(ids)
    assert stats["lengths"] == {"edges": [short, short + 1], "counts": [1]}  # the long one is in none
    for words in ("2 rows", "1 truncated", "1 system turns left out", "no place for system turns"):
        assert words in prepared.summary()


def test_plain_text_with_loss_on_all(chats):
    tokenizer = phi3_tokenizer(None, add_bos=True)
    prepared = prepare_data(chats({"text": "the hen 12"}, loss_on="all"), tokenizer, seed=0)
    assert preview(prepared.train, tokenizer) == "<s>⟦the hen 12<|endoftext|>⟧"
    with pytest.raises(InputError, match="no chat template tells the markers"):
        prepare_data(chats({"text": "the hen 12"}), tokenizer, seed=0)


def test_rows_that_are_too_long_are_told(chats):
    row = {"prompt": "x", "completion": "a" * 2**23}
    data = chats({"prompt": "x", "completion": "y"}, row)
    with pytest.raises(InputError, match=r"row 2: has 8,388,\d\d\d characters, expected 8,388,608 at most"):
        prepare_data(data, phi3_tokenizer(JULY), seed=0)


def test_sections_that_make_no_sense(chats):
    data = chats({"messages": PAIR}, {"messages": PAIR})
    for change, message in {("train", None): "data.train is not set", ("eval_fraction", 0.6): "leave nothing"}.items():
        with pytest.raises(InputError, match=message):
            prepare_data(dataclasses.replace(data, **dict([change])), phi3_tokenizer(JULY), seed=0)
    only = dataclasses.replace(chats({"messages": PAIR}), eval_fraction=0.1)
    with pytest.raises(InputError, match=r"jsonl: 1 row leaves nothing to train on with data.eval_fraction 0.1"):
        prepare_data(only, phi3_tokenizer(JULY), seed=0)
    wrong = dataclasses.replace(chats({"messages": [{**PAIR[0], "role": "usr"}, PAIR[1]]}), eval_fraction=0.1)
    with pytest.raises(InputError, match=r"row 1, turn 1: unknown role 'usr'"):  # the row's own fault first
        prepare_data(wrong, phi3_tokenizer(JULY), seed=0)
    data = chats({"messages": PAIR}, {"messages": PAIR})
    with pytest.raises(InputError, match=r"keep one of them \(--data.eval_fraction 0"):
        prepare_data(dataclasses.replace(data, eval=data.train, eval_fraction=0.1), phi3_tokenizer(JULY), seed=0)
    Path(data.train).write_text("\n")
    with pytest.raises(InputError, match=r"chats.jsonl: no usable rows; the data is empty"):
        prepare_data(data, phi3_tokenizer(JULY), seed=0)


def test_the_held_out_rows_are_those_of_train_test_split(chats):
    data = chats(*({"prompt": str(i), "completion": f"a{i}"} for i in range(31)), eval_fraction=0.1)
    prepared = prepare_data(data, phi3_tokenizer(JULY), seed=1234)
    held_out = {reference for _, reference in prepared.eval_sets["eval"].prompts}
    table = datasets.Dataset.from_list([{"a": f"a{i}"} for i in range(31)]).train_test_split(0.1, seed=1234)
    assert held_out == set(table["test"]["a"])
    assert {reference for _, reference in prepared.train.prompts} == set(table["train"]["a"])


def test_evaluation_from_another_file_and_at_most_so_many_rows(chats, tmp_path):
    (tmp_path / "eval.jsonl").write_text(json.dumps({"messages": PAIR}) + "\n")
    data = chats(*[{"messages": PAIR}] * 3, eval=str(tmp_path / "eval.jsonl"), max_rows=2)
    prepared = prepare_data(data, phi3_tokenizer(JULY), seed=0)
    assert (len(prepared.train), len(prepared.eval_sets["eval"])) == (2, 1)
    assert prepared.eval_sets["eval"].stats.sources == [str(tmp_path / "eval.jsonl")]


@pytest.mark.parametrize("name", ["april", "july", "phi-3.5", "phi-4", "phi-4-mini"])
def test_prompts_are_what_generation_starts_from(chats, name):
    """The tokens before the last answer are those of the template with add_generation_prompt."""
    tokenizer = templates()[name]
    messages = [*PAIR, {"role": "user", "content": "and the hen?"}]
    prepared = prepare_data(chats({"messages": [*messages, PAIR[1]]}, max_length=256), tokenizer, seed=0)
    expected = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    [(prompt, reference)] = prepared.train.prompts
    assert prompt.tolist() == tokenizer(expected, add_special_tokens=False)["input_ids"]
    assert reference == "12"
    turns = tuple(Turn(message["role"], message["content"]) for message in messages)
    assert ChatTokenizer(tokenizer).prompt(turns).tolist() == prompt.tolist()


def test_a_prompt_begins_as_training_rows_do_and_cannot_end_its_own_turn(chats):
    tokenizer = phi3_tokenizer(JULY, add_bos=True)  # the tokenizer adds a BOS to text, the template writes none
    [(expected, _)] = prepare_data(chats({"messages": PAIR}), tokenizer, seed=0).train.prompts
    chat = ChatTokenizer(tokenizer)
    assert chat.prompt((Turn("user", "the hen"),)).tolist() == expected.tolist()
    messages = [{"role": "user", "content": "the hen"}]
    assert expected.tolist() == tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    end = tokenizer.convert_tokens_to_ids("<|end|>")
    assert chat.prompt((Turn("user", "the <|end|> hen"),)).tolist().count(end) == 1


# The real tokenizers and data.


@pytest.fixture(scope="module", params=["2024-04", "2024-07"])
def phi3(request, testdata):
    from phi3_jax.hf.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(testdata / "models" / "phi-3-mini-4k-instruct")
    if request.param == "2024-07":
        later = testdata / "models" / "phi-3-mini-4k-instruct.2024-07" / "tokenizer_config.json"
        tokenizer.chat_template = json.loads(later.read_text())["chat_template"]
        tokenizer.backend_tokenizer.post_processor = _no_bos()
    return tokenizer


def _no_bos():
    from tokenizers.processors import TemplateProcessing

    return TemplateProcessing(single="$A", special_tokens=[])


@pytest.mark.parametrize(
    ("file", "read"),
    [
        ("gsm8k/train-1500.jsonl", lambda row: [("user", row["question"]), ("assistant", row["answer"])]),
        (
            "alpaca/alpaca_en_demo.json",
            lambda row: [
                ("user", "\n\n".join(part for part in (row["instruction"], row["input"]) if part)),
                ("assistant", row["output"]),
            ],
        ),
        (
            "sharegpt/dummy_conversation.json",
            lambda row: [({"human": "user", "gpt": "assistant"}[t["from"]], t["value"]) for t in row["conversations"]],
        ),
        ("messages/v1_sft_demo.jsonl", lambda row: [(t["role"], t["content"][0]["value"]) for t in row["messages"]]),
    ],
)
def test_real_rows_get_the_ids_that_transformers_gives(phi3, testdata, file, read):
    path = testdata / "datasets" / file
    columns = {"prompt": "question", "completion": "answer"} if "gsm8k" in file else None
    prepared = prepare_data(DataSection(train=str(path), columns=columns), phi3, seed=0)
    lines = json.loads(path.read_text()) if path.suffix == ".json" else map(json.loads, path.read_text().splitlines())
    for (ids, mask), row in zip(prepared.train, lines, strict=True):
        turns = read(row)
        text = phi3.apply_chat_template([{"role": role, "content": content} for role, content in turns], tokenize=False)
        assert ids.tolist() == phi3(text, add_special_tokens=False)["input_ids"]
        answers = "".join(content.lstrip() + "<|end|>" for role, content in turns if role == "assistant")
        assert phi3.decode(ids[mask == 1]).replace(" ", "") == answers.replace(" ", "")
    if "gsm8k" in file:
        assert prepared.train.stats.packing_efficiency >= 0.98
        assert len(plan_epoch(prepared.train, DataSection(), Order(0), 3)) == 147


def test_the_cookbooks_pre_rendered_rows(phi3, testdata):
    path = testdata / "datasets" / "phi3cookbook" / "mlx_train.jsonl"
    prepared = prepare_data(DataSection(train=str(path)), phi3, seed=0)
    first = prepared.train[0][0][prepared.train[0][1] == 1]
    assert phi3.decode(first) == "The precise origin of fortune cookies is unclear <|end|>"
    assert (prepared.train.input_ids == 1).sum() == (len(prepared.train) if "bos" in phi3.chat_template else 0)


def test_ids_of_a_rendered_chat_recorded_elsewhere(phi3, testdata, chats):
    vectors = json.loads((testdata / "tokenizer_vectors" / "onnxruntime-extensions_phi3.json").read_text())
    case = next(case for case in vectors["cases"] if "messages" in case)
    if "bos_token" in phi3.chat_template:
        pytest.skip("recorded with the later template")
    prepared = prepare_data(chats({"messages": case["messages"]}), phi3, seed=0)
    ids, mask = prepared.train[0]
    # Recorded with the generation prompt in the place of our closing <|endoftext|>.
    assert ids.tolist() == [*case["ids"][:-1], 32000]
    assert ids[mask == 1].tolist() == case["ids"][17:-1]


def test_stories260k_has_no_template(testdata):
    from phi3_jax.hf.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(testdata / "checkpoints" / "stories260K")
    gsm8k = testdata / "datasets" / "gsm8k" / "test-200.jsonl"
    data = DataSection(train=str(gsm8k), columns={"prompt": "question", "completion": "answer"})
    prepared = prepare_data(data, tokenizer, seed=0)
    ids, mask = prepared.train[0]
    row = json.loads(gsm8k.read_text().splitlines()[0])
    assert ids.tolist().count(1) == 1
    assert tokenizer.decode(ids[mask == 1]) == row["answer"] + "</s>"
    assert tokenizer.decode(prepared.train.prompts[0][0], skip_special_tokens=True) == row["question"] + "\n"
    messages = DataSection(train=str(testdata / "datasets" / "messages" / "v1_sft_demo.jsonl"))
    with pytest.raises(InputError, match="row 1: the tokenizer has no chat template"):
        prepare_data(messages, tokenizer, seed=0)


def test_a_recipes_split_of_another_dataset_does_not_make_the_training_rows_an_evaluation_set(chats):
    data = chats({"messages": PAIR}, split="train_sft", eval_split="test_sft")
    prepared = prepare_data(data, phi3_tokenizer(JULY), seed=0)
    assert not prepared.eval_sets
    assert "no evaluation" in prepared.summary()
    assert "test_sft" in prepared.summary()
