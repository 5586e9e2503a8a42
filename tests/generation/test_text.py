"""Answers to many prompts: each is the one that the prompt gets by itself."""

from typing import Any

import jax
import numpy as np
import pytest

from phi3_jax import InputError, LoraConfig
from phi3_jax.config.generation import GenerationConfig
from phi3_jax.generation import text as text_module
from phi3_jax.generation.stream import stream_answer
from phi3_jax.generation.text import Answer, answer_prompts, answer_with_each, end_token_ids
from phi3_jax.lora import Lora, init_lora, per_row
from tests.helpers.models import tiny_model
from tests.helpers.tokenizers import tiny_tokenizer

# Of one bucket of lengths, so that little is compiled.
LENGTHS = (3, 9, 5, 4, 7)


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model(layers=1, max_position_embeddings=64)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    rng = np.random.default_rng(0)
    return [rng.integers(7, 40, length).tolist() for length in LENGTHS]


@pytest.fixture(scope="module")
def loras(model: Any) -> list[Lora]:
    config = LoraConfig(r=2, lora_alpha=64, init_lora_weights=False, target_modules=["o_proj"])
    return [init_lora(model, config, jax.random.key(seed)) for seed in (1, 2)]


@pytest.fixture
def settings() -> GenerationConfig:
    return GenerationConfig(max_new_tokens=7)


@pytest.fixture
def drawing(settings: GenerationConfig) -> GenerationConfig:
    return settings.with_(do_sample=True, temperature=2.0, top_k=0, seed=3)


def run(model: Any, tokenizer: Any, prompts: Any, **arguments: Any) -> list[Answer]:
    """The answers in the order of the prompts."""
    found = sorted(answer_prompts(model, tokenizer, prompts, **arguments), key=lambda pair: pair[0])
    return [answer for _, answer in found]


def test_the_end_token_is_no_text(model, tokenizer, prompts, settings):
    (free,) = run(model, tokenizer, prompts[:1], settings=settings)
    assert free.finish_reason == "length"
    end = free.tokens[4]
    assert end not in free.tokens[:4]
    (answer,) = run(model, tokenizer, prompts[:1], settings=settings.with_(eos_token_id=(end,)))
    assert answer.finish_reason == "stop"
    assert answer.tokens == free.tokens[:5]
    assert answer.text == tokenizer.decode(free.tokens[:4], skip_special_tokens=True)
    assert answer.logprobs == free.logprobs[:5]


def test_an_answer_does_not_depend_on_batches(model, tokenizer, prompts, drawing):
    alone = [answer.tokens for answer in run(model, tokenizer, prompts, settings=drawing, batch_size=1)]
    together = [answer.tokens for answer in run(model, tokenizer, prompts, settings=drawing, batch_size=2)]
    assert together == alone
    other = run(model, tokenizer, prompts, settings=drawing.with_(seed=4), batch_size=2)
    assert [answer.tokens for answer in other] != alone


@pytest.mark.parametrize("beams", [{}, {"num_beams": 2}])
def test_max_length_counts_each_prompts_own_tokens(model, tokenizer, prompts, beams):
    settings = GenerationConfig(max_length=12, **beams)
    together = run(model, tokenizer, prompts, settings=settings, batch_size=3)
    assert [len(answer.tokens) for answer in together] == [12 - length for length in LENGTHS]
    for prompt, answer in zip(prompts, together, strict=True):
        own = GenerationConfig(max_new_tokens=12 - len(prompt), **beams)
        assert run(model, tokenizer, [prompt], settings=own)[0].tokens == answer.tokens


def test_equal_prompts_draw_apart(model, tokenizer, prompts, drawing):
    first, second = run(model, tokenizer, [prompts[0]] * 2, settings=drawing)
    assert first.tokens != second.tokens
    first, second = run(model, tokenizer, [prompts[0]] * 2, settings=drawing.with_(seed=(7, 7)))
    assert first.tokens == second.tokens


def test_batches_have_one_shape_and_little_padding(model, tokenizer, prompts, drawing, monkeypatch):
    shapes, answers = [], text_module.answers

    def spy(model: Any, ids: Any, mask: Any, *rest: Any) -> Any:
        shapes.append((len(ids), int(mask.sum(axis=1).min()), ids.shape[1]))
        return answers(model, ids, mask, *rest)

    monkeypatch.setattr(text_module, "answers", spy)
    indices = [index for index, _ in answer_prompts(model, tokenizer, prompts, settings=drawing, batch_size=2)]
    assert sorted(indices) == list(range(len(prompts)))
    assert shapes == [(2, 7, 9), (2, 4, 5), (2, 3, 3)]


def test_a_stop_string_is_cut_off(model, tokenizer, prompts, settings):
    (free,) = run(model, tokenizer, prompts[:1], settings=settings)
    stop = tokenizer.decode(free.tokens[3:5])
    assert len(stop) == 2
    (answer,) = run(model, tokenizer, prompts[:1], settings=settings.with_(stop_strings=(stop,)))
    assert answer.text == free.text[: free.text.index(stop)]
    assert answer.finish_reason == "stop"
    assert answer.tokens == free.tokens[:5]


def test_several_answers_to_each_prompt(model, tokenizer, prompts, drawing):
    own = drawing.with_(num_return_sequences=2)
    found = list(answer_prompts(model, tokenizer, prompts[:3], settings=own, batch_size=1))
    assert sorted(index for index, _ in found) == [0, 0, 1, 1, 2, 2]
    assert len({answer.tokens for _, answer in found}) > 3


def test_each_prompt_may_have_an_adapter_of_its_own(model, tokenizer, prompts, loras, drawing):
    places, seeds = [0, -1, 1, 1, 0], (1, 2, 3, 4, 5)
    lora, own = per_row(loras, np.array(places)), drawing.with_(seed=seeds)
    mixed = run(model, tokenizer, prompts, lora=lora, settings=own, batch_size=2)
    for index, place in enumerate(places):
        (alone,) = run(
            model,
            tokenizer,
            prompts[index : index + 1],
            lora=None if place < 0 else loras[place],
            settings=drawing.with_(seed=seeds[index : index + 1]),
        )
        assert mixed[index].tokens == alone.tokens


def test_adapters_side_by_side_draw_with_the_same_seed(model, tokenizer, prompts, loras, drawing):
    adapters = {"base": None, "a": loras[0], "again": loras[0]}
    found = {
        (index, name): answer.tokens
        for index, name, answer in answer_with_each(
            model, tokenizer, prompts[:2], adapters, settings=drawing, batch_size=2
        )
    }
    assert len(found) == 6
    base = run(model, tokenizer, prompts[:2], settings=drawing)
    assert [found[index, "base"] for index in (0, 1)] == [answer.tokens for answer in base]
    for index in (0, 1):
        assert found[index, "a"] == found[index, "again"] != found[index, "base"]


def test_adapters_with_saved_modules_answer_one_after_the_other(model, tokenizer, prompts, loras, drawing):
    saving = init_lora(model, LoraConfig(r=2, modules_to_save=["norm"]), jax.random.key(0))
    adapters = {"saving": saving, "a": loras[0]}
    results = answer_with_each(model, tokenizer, prompts[:1], adapters, settings=drawing)
    found = {name: answer for _, name, answer in results}
    assert list(found) == ["saving", "a"]
    (expected,) = run(model, tokenizer, prompts[:1], lora=loras[0], settings=drawing)
    assert found["a"].tokens == expected.tokens != found["saving"].tokens


@pytest.mark.parametrize("drawn", [False, True])
def test_streamed_pieces_are_the_answer(drawn, model, tokenizer, prompts, settings, drawing):
    own = (drawing if drawn else settings).with_(seed=(11,))
    written: list[str] = []
    answer = stream_answer(model, tokenizer, prompts[0], written.append, settings=own)
    (expected,) = run(model, tokenizer, prompts[:1], settings=own)
    assert answer.tokens == expected.tokens
    assert "".join(written) == answer.text == expected.text
    assert len(written) > 2


def test_a_streamed_answer_can_be_stopped(model, tokenizer, prompts, settings):
    written: list[str] = []
    answer = stream_answer(
        model, tokenizer, prompts[0], written.append, settings=settings, is_stopped=lambda: len(written) > 4
    )
    assert "".join(written) == answer.text
    assert 4 < len(answer.text) < settings.max_new_tokens


@pytest.mark.parametrize(
    ("prompts", "changes", "words"),
    [
        ([[1], []], {}, "prompts[1] is empty"),
        ([[1], [1] * 60], {}, "prompts[1] has 60 tokens"),
        ([[1]], {"max_new_tokens": 64}, "leave room for 0"),
        ([[1], [1] * 9], {"max_new_tokens": None, "max_length": 9}, "prompts[1]: the prompt has 9 tokens, and max_len"),
        ([[1]], {"seed": (1, 2)}, "2 seeds for 1 prompts"),
        ([[1], [1, 53]], {}, "prompts[1]: token id 53 has no row"),
    ],
)
def test_refused_before_anything_is_generated(prompts, changes, words, model, tokenizer, settings):
    with pytest.raises(InputError, match=words.replace("[", r"\[").replace("]", r"\]")):
        answer_prompts(model, tokenizer, prompts, settings=settings.with_(**changes))


def test_end_tokens_are_those_of_model_tokenizer_and_template():
    model = tiny_model(layers=1, eos_token_id=1)
    names = {tiny_tokenizer().convert_ids_to_tokens(index) for index in end_token_ids(tiny_tokenizer(), model.config)}
    assert names == {"<s>", "<|endoftext|>", "<|end|>"}
