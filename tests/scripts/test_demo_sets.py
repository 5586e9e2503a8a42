"""The demo's generators: the same rows every time, and nothing of the held-out rows in what is trained on."""

import json
import re
from random import Random

import pytest
from demo_sets.chats import HELD_OUT, base_corpus
from demo_sets.orders import NUMBER_WORDS, Order, chat_set, write_message, write_record, write_rows

from phi3_jax.demo import demo_path


def words(rows):
    return set(re.findall(r"[a-z]+", json.dumps(rows).lower()))


def question(row):
    return row["messages"][0]["content"]


def record(row):
    return row["messages"][1]["content"]


@pytest.fixture(scope="module")
def rows():
    return chat_set()


@pytest.mark.parametrize("number", [0, 1])
def test_the_generator_writes_the_packaged_files_again(rows, number, tmp_path):
    packaged = demo_path(("orders_train.jsonl", "orders_eval.jsonl")[number])
    write_rows(tmp_path / "again.jsonl", rows[number])
    assert (tmp_path / "again.jsonl").read_bytes() == packaged.read_bytes()


def test_another_seed_gives_other_rows(rows):
    train, held_out = chat_set(seed=1)
    assert train != rows[0]
    assert held_out != rows[1]


def test_no_order_is_in_both_sets(rows):
    train, held_out = rows
    assert not {question(row) for row in train} & {question(row) for row in held_out}
    assert not {record(row) for row in train} & {record(row) for row in held_out}
    assert len({record(row) for row in train}) == len(train)


def test_held_out_words_are_trained_on_nowhere(rows):
    assert not words(rows[0]) & HELD_OUT
    assert not words(base_corpus(rows=20_000)) & HELD_OUT
    assert sum(bool(words([row]) & HELD_OUT) for row in rows[1]) == len(rows[1]) // 4


def test_no_held_out_message_is_in_the_base_corpus(rows):
    corpus = json.dumps(base_corpus(rows=48_000))
    assert not [row for row in rows[1] if json.dumps(question(row))[1:-1] in corpus]


def test_the_base_corpus_never_uses_the_house_format():
    text = json.dumps(base_corpus(rows=20_000))
    assert "colour:" not in text
    assert "item:" not in text


def test_every_record_says_what_its_message_says(rows):
    numbers = {str(number): word for number, word in NUMBER_WORDS.items()}
    for row in rows[0] + rows[1]:
        text = question(row)
        fields = dict(part.split(": ") for part in record(row).split("; "))
        assert list(fields) == ["item", "colour", "count", "city", "day"]
        for name in ("item", "colour", "city"):
            assert re.search(rf"\b{fields[name]}\b", text, re.IGNORECASE), (name, text)
        assert re.search(rf"\b({fields['count']}|{numbers.get(fields['count'], '-')})\b", text, re.IGNORECASE), text
        assert (fields["day"] in text) if fields["day"] != "open" else not re.search(r"\w+day\b", text), text


def test_a_message_and_its_record():
    order = Order(items="mugs", colour="red", count=3, city="Oslo", day=None, name="Ann")
    assert write_record(order) == "item: mugs; colour: red; count: 3; city: Oslo; day: open"
    messages = {write_message(Random(seed), order) for seed in range(2000)}
    assert "Could you send 3 red mugs to Oslo?" in messages
    assert not any("None" in message or "[" in message or "{" in message for message in messages)


def test_the_base_corpus_is_seeded():
    assert base_corpus(3, 50) == base_corpus(3, 50) != base_corpus(4, 50)
