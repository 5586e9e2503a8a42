"""The loss: which tokens count, and how much."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from phi3_jax.objectives.next_token import loss, loss_sums, neftune_noise, row_sums
from phi3_jax.system.errors import InputError
from tests.helpers.models import VOCAB, random_lora, tiny_model
from tests.helpers.rows import random_rows


def by_hand(model, lora, rows):
    """The mean loss and accuracy, token by token in float64."""
    logits = np.asarray(
        model(rows["input_ids"], segment_ids=rows["segment_ids"], positions=rows["positions"], lora=lora), np.float64
    )
    losses, hits = [], []
    for row in range(logits.shape[0]):
        for t in range(1, logits.shape[1]):
            if rows["loss_mask"][row, t]:
                scores = logits[row, t - 1]
                losses.append(np.log(np.exp(scores).sum()) - scores[rows["input_ids"][row, t]])
                hits.append(scores.argmax() == rows["input_ids"][row, t])
    return np.array(losses), np.array(hits)


def test_mean_over_the_masked_tokens():
    model, rows = tiny_model(), random_rows([9, 16, 4], 16)
    lora = random_lora(model)
    losses, hits = by_hand(model, lora, rows)
    total, count, correct = loss_sums(model, lora, rows)
    assert count == len(losses)
    assert correct == hits.sum()
    # float32 sums of some twenty terms
    np.testing.assert_allclose(total, losses.sum(), rtol=2e-6)
    np.testing.assert_allclose(loss(model, lora, rows), losses.mean(), rtol=2e-6)


def test_accuracy_counts_what_the_model_holds_most_likely():
    model = tiny_model()
    rows = random_rows([12, 12], 12)
    greedy = np.asarray(model(rows["input_ids"]).argmax(-1))
    rows["loss_mask"][:] = 0
    for row, t in ((0, 3), (1, 7)):  # tokens that no later one depends on are set to the model's guess
        rows["input_ids"][row, t:] = greedy[row, t - 1]
        rows["loss_mask"][row, t] = 1
    rows["loss_mask"][0, 1] = 1
    guessed_right = int(greedy[0, 0] == rows["input_ids"][0, 1])
    assert loss_sums(model, None, rows)[2] == 2 + guessed_right


@pytest.mark.parametrize(
    ("name", "token", "words"),
    [
        ("input_ids", VOCAB, r"input_ids\[0, 2\]: token id 53 has no row in the model's embedding, which has 53"),
        ("input_ids", -1, r"input_ids\[0, 2\]: token id -1 is negative"),
        ("labels", VOCAB, r"labels\[0, 2\]: token id 53 has no row"),
        ("labels", -1, r"labels\[0, 2\]: token id -1 is negative"),
    ],
)
def test_an_id_without_a_row_is_refused_where_its_value_is_known(name, token, words):
    model = tiny_model()
    good = {"input_ids": np.array([[1, 5, 9, 7]]), "labels": np.array([[-100, -100, 9, 7]])}
    batch = {key: ids.copy() for key, ids in good.items()}
    batch[name][0, 2] = token
    on_device = {key: jnp.asarray(ids) for key, ids in batch.items()}
    with pytest.raises(InputError, match=words):
        loss(model, None, batch)
    with pytest.raises(InputError, match=words):
        jax.grad(lambda lora: loss(model, lora, on_device))(random_lora(model))
    with pytest.raises(InputError, match=words):
        jax.jit(lambda lora: loss(model, lora, on_device))(random_lora(model))
    with pytest.raises(InputError, match=words):
        row_sums(model, None, on_device)
    # A compiled program says nothing: NaN, or some other row's loss.
    silent = jax.jit(lambda batch: loss(model, None, batch))
    assert jnp.isfinite(silent(good))
    assert silent(batch) != silent(good)
    assert jnp.isnan(silent(batch)) == (name == "labels" and token == VOCAB)


def test_what_stands_at_padding_is_nobodys_id():
    model = tiny_model()
    batch = {"input_ids": np.array([[1, 5, 9, 0]]), "attention_mask": np.array([[1, 1, 1, 0]])}
    expected = loss(model, None, batch)
    for padding in (-1, VOCAB):
        assert loss(model, None, {**batch, "input_ids": np.array([[1, 5, 9, padding]])}) == expected


def test_labels_are_those_of_transformers():
    model, rows = tiny_model(), random_rows([16, 11], 16)
    labels = np.where(rows["loss_mask"] == 1, rows["input_ids"], -100)
    batch = {"input_ids": rows["input_ids"], "attention_mask": rows["segment_ids"], "labels": labels}
    np.testing.assert_allclose(loss(model, None, batch), loss(model, None, rows), rtol=1e-6)


def test_without_mask_every_real_token_but_the_first_counts():
    model, rows = tiny_model(), random_rows([16, 11], 16)
    left = {name: np.roll(rows[name], 5, axis=1) for name in ("input_ids", "segment_ids")}
    right_padded = {"input_ids": rows["input_ids"][1:], "attention_mask": rows["segment_ids"][1:]}
    left_padded = {"input_ids": left["input_ids"][1:], "attention_mask": left["segment_ids"][1:]}
    assert loss_sums(model, None, right_padded)[1] == 10
    assert loss_sums(model, None, left_padded)[1] == 10
    np.testing.assert_allclose(loss(model, None, left_padded), loss(model, None, right_padded), rtol=1e-5)
    assert loss_sums(model, None, {"input_ids": rows["input_ids"]})[1] == 2 * 15


def test_packed_rows_lose_what_their_documents_lose_apart():
    model = tiny_model()
    lora = random_lora(model)
    apart = random_rows([7, 5, 4], 16, seed=3)
    packed = {name: np.zeros((1, 16), np.int32) for name in apart}
    start = 0
    for row, length in enumerate([7, 5, 4]):
        for name in apart:
            packed[name][0, start : start + length] = apart[name][row, :length]
        packed["segment_ids"][0, start : start + length] = row + 1
        packed["loss_mask"][0, start] = 1  # the first of a document is no target, whatever the mask says
        start += length
    total, count, correct = loss_sums(model, lora, apart)
    packed_total, packed_count, packed_correct = loss_sums(model, lora, packed)
    assert (packed_count, packed_correct) == (count, correct)
    np.testing.assert_allclose(packed_total, total, rtol=1e-5)


def test_no_target_at_all_is_no_division_by_zero():
    model, rows = tiny_model(), random_rows([8], 8)
    rows["loss_mask"][:] = 0
    value, grads = jax.jit(jax.value_and_grad(lambda lora: loss(model, lora, rows)))(random_lora(model))
    assert value == 0
    assert all(bool((g == 0).all()) for g in jax.tree.leaves(grads))


def test_label_smoothing_spreads_over_the_vocabulary():
    model, rows = tiny_model(), random_rows([12, 12], 12)
    logits = jax.nn.log_softmax(model(rows["input_ids"], segment_ids=rows["segment_ids"]))
    soft = 0.9 * jax.nn.one_hot(rows["input_ids"][:, 1:], VOCAB) + 0.1 / VOCAB
    losses = -jnp.sum(soft * logits[:, :-1], axis=-1)
    mask = rows["loss_mask"][:, 1:]
    expected = jnp.sum(losses * mask) / mask.sum()
    np.testing.assert_allclose(loss(model, None, rows, label_smoothing=0.1), expected, rtol=2e-6)


def test_neftune_noise_has_the_documents_size_and_spares_padding():
    segments = jnp.array([[1] * 60 + [2] * 40 + [0] * 28])
    noise = np.asarray(neftune_noise(jax.random.key(0), segments, 64, alpha=5.0))
    assert (noise[0, 100:] == 0).all()
    for part, length in ((noise[0, :60], 60), (noise[0, 60:100], 40)):
        bound = 5 / np.sqrt(length * 64)
        assert abs(part).max() <= bound
        # uniform: standard deviation bound / √3; 2,560 draws or more have it within 3%
        np.testing.assert_allclose(part.std(), bound / np.sqrt(3), rtol=0.03)


def test_neftune_noise_takes_memory_that_grows_with_the_length_alone():
    """A square of the length would be four times as much at twice the length."""

    def temporaries(length: int) -> int:
        shapes = jax.random.key(0), jax.ShapeDtypeStruct((1, length), jnp.int32)
        noise = jax.jit(lambda key, segments: neftune_noise(key, segments, 8, 5.0))
        return noise.lower(*shapes).compile().memory_analysis().temp_size_in_bytes

    assert temporaries(8192) <= 2.1 * temporaries(4096)


def test_neftune_acts_in_training_alone():
    model, rows = tiny_model(), random_rows([12, 12], 12)
    clean = loss(model, None, rows)
    key = jax.random.key(0)
    assert loss(model, None, rows, neftune_alpha=5.0) == clean
    assert loss(model, None, rows, dropout_key=key) == clean  # nothing to drop in this model
    noisy = loss(model, None, rows, neftune_alpha=5.0, dropout_key=key)
    assert noisy != clean
    assert noisy == loss(model, None, rows, neftune_alpha=5.0, dropout_key=key)
    assert noisy != loss(model, None, rows, neftune_alpha=5.0, dropout_key=jax.random.key(1))


def test_batches_that_make_no_sense():
    model, rows = tiny_model(), random_rows([8], 8)
    with pytest.raises(InputError, match="input_ids"):
        loss(model, None, {"loss_mask": rows["loss_mask"]})
    with pytest.raises(InputError, match="both loss_mask and labels"):
        loss(model, None, {**rows, "labels": rows["input_ids"]})
