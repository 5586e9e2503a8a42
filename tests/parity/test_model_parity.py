"""The model against transformers' own, in float32, for every kind of configuration.

Both sum in different orders: errors of a few units in the last place grow with the widths and the
number of layers, to about 1e-6 of the largest logit here. 1e-5 leaves one order of magnitude.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")

from phi3_jax import Phi3ForCausalLM  # noqa: E402
from phi3_jax.model.rope import inverse_frequencies  # noqa: E402
from tests.helpers.references import longrope, torch_phi3  # noqa: E402

RTOL = 1e-5

KINDS: dict[str, dict[str, Any]] = {
    "mha": {},
    "gqa": {"num_key_value_heads": 2},
    "mqa": {"num_key_value_heads": 1},
    "tied": {"tie_word_embeddings": True},
    "partial": {"partial_rotary_factor": 0.75},
    "window": {"sliding_window": 5},
    "theta": {"rope_theta": 250000.0},
    "no_pad_token": {"pad_token_id": None},
    "longrope": longrope(8),
    "longrope_partial_gqa_tied": {
        **longrope(6),
        "partial_rotary_factor": 0.75,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
        "sliding_window": 7,
    },
}


def relative(ours: Any, theirs: Any) -> float:
    ours, theirs = np.asarray(ours, np.float32), np.asarray(theirs, np.float32)
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


def ids(batch: int, seq: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(3, 99, (batch, seq))


@pytest.fixture(scope="module", params=KINDS)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Phi3ForCausalLM]:
    folder = tmp_path_factory.mktemp(request.param)
    theirs = torch_phi3(folder, **KINDS[request.param])
    return theirs, Phi3ForCausalLM.from_pretrained(str(folder), dtype=jnp.float32)


# 16 is LongRoPE's original length in these configurations: the last short length, the first long
# one, and one that is far beyond.
@pytest.mark.parametrize("seq", [1, 16, 17, 40])
def test_logits_and_every_hidden_state(pair: tuple[Any, Phi3ForCausalLM], seq: int) -> None:
    theirs, ours = pair
    tokens = ids(2, seq)
    with torch.no_grad():
        expected = theirs(torch.tensor(tokens), output_hidden_states=True)
    logits = ours(tokens)
    assert logits.dtype == jnp.float32
    assert relative(logits, expected.logits) < RTOL
    states = ours.hidden_states(tokens)
    assert len(states) == len(expected.hidden_states)
    for ours_state, their_state in zip(states, expected.hidden_states, strict=True):
        assert relative(ours_state, their_state) < RTOL


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_on_either_side(pair: tuple[Any, Phi3ForCausalLM], side: str) -> None:
    theirs, ours = pair
    lengths = [14, 9, 3]
    tokens, mask = np.zeros((3, 14), int), np.zeros((3, 14), int)
    for row, length in enumerate(lengths):
        place = slice(14 - length, 14) if side == "left" else slice(length)
        tokens[row, place], mask[row, place] = ids(1, length, seed=row)[0], 1
    logits = ours(tokens, attention_mask=mask)
    assert np.isfinite(logits).all()
    for row, length in enumerate(lengths):
        place = mask[row] == 1
        with torch.no_grad():
            alone = theirs(torch.tensor(tokens[row, place])[None]).logits[0]
            positions = torch.tensor(np.maximum(np.cumsum(mask[row]) - 1, 0))[None]
            padded = theirs(
                torch.tensor(tokens[row])[None], attention_mask=torch.tensor(mask[row])[None], position_ids=positions
            ).logits[0, place]
        assert len(alone) == length
        assert relative(logits[row, place], alone) < RTOL
        assert relative(logits[row, place], padded) < RTOL


def test_explicit_positions(pair: tuple[Any, Phi3ForCausalLM]) -> None:
    theirs, ours = pair
    tokens, positions = ids(2, 10), np.arange(10)[None] + np.array([[0], [0]]) + 5
    with torch.no_grad():
        expected = theirs(torch.tensor(tokens), position_ids=torch.tensor(positions)).logits
    assert relative(ours(tokens, positions=positions), expected) < RTOL


def test_packed_documents_are_alone(pair: tuple[Any, Phi3ForCausalLM]) -> None:
    """Also where one of them is past LongRoPE's original length and the other is not."""
    theirs, ours = pair
    first, second = ids(1, 20, seed=1)[0], ids(1, 9, seed=2)[0]
    row = np.concatenate([first, second, np.zeros(3, int)])[None]
    segments = np.array([[1] * 20 + [2] * 9 + [0] * 3])
    logits = ours(row, segment_ids=segments)[0]
    with torch.no_grad():
        assert relative(logits[:20], theirs(torch.tensor(first)[None]).logits[0]) < RTOL
        assert relative(logits[20:29], theirs(torch.tensor(second)[None]).logits[0]) < RTOL
    positions = np.array([[*range(20), *range(9), 0, 0, 0]])
    np.testing.assert_array_equal(ours(row, segment_ids=segments, positions=positions)[0, :29], logits[:29])


def test_longrope_factors_follow_each_row(tmp_path: Any) -> None:
    """transformers decides for the whole batch; a row must not depend on its neighbours."""
    theirs = torch_phi3(tmp_path, **longrope(8))
    ours = Phi3ForCausalLM.from_pretrained(str(tmp_path), dtype=jnp.float32)
    tokens = ids(2, 30)
    mask = np.ones((2, 30), int)
    mask[1, 12:] = 0
    logits = ours(tokens, attention_mask=mask)
    with torch.no_grad():
        short = theirs(torch.tensor(tokens[1:, :12])).logits[0]
        long = theirs(torch.tensor(tokens[:1])).logits[0]
    assert relative(logits[0], long) < RTOL
    assert relative(logits[1, :12], short) < RTOL


def test_gradients_of_every_weight(pair: tuple[Any, Phi3ForCausalLM]) -> None:
    """Full fine-tuning's gradients; 1e-4 of each tensor's largest entry, and 1e-5 holds for most."""
    from flax import nnx

    theirs, ours = pair
    tokens = ids(2, 18)
    tokens[:, 4] = 0  # the padding token's embedding gets no gradient
    theirs.zero_grad()
    theirs(torch.tensor(tokens)).logits.square().mean().backward()
    graph, state = nnx.split(ours)
    grads = jax.jit(jax.grad(lambda state: jnp.mean(nnx.merge(graph, state)(tokens) ** 2)))(state)
    grads = {".".join(map(str, path)): leaf[...] for path, leaf in nnx.to_flat_state(grads)}
    for name, parameter in theirs.named_parameters():
        parts = name.split(".")
        layer = int(parts.pop(2)) if "layers" in parts else None
        ours_grad = grads[".".join(parts)] if layer is None else grads[".".join(parts)][layer]
        assert relative(ours_grad, parameter.grad) < 1e-4, name


def test_rematerialisation_changes_nothing(pair: tuple[Any, Phi3ForCausalLM]) -> None:
    _, ours = pair
    np.testing.assert_array_equal(ours(ids(1, 7)), ours(ids(1, 7), remat=True))


@pytest.mark.parametrize("kind", ["gqa", "window", "longrope", "longrope_partial_gqa_tied"])
def test_bfloat16_is_as_close_to_the_truth_as_transformers(kind: str, tmp_path: Any) -> None:
    """bfloat16 results differ by rounding, so both are held against float32 on the same weights.

    The reference's own root-mean-square error is the yardstick; ours rounds in fewer places
    (scores and logits stay float32), so it may not be larger by more than a tenth.
    """
    theirs = torch_phi3(tmp_path, **{**KINDS[kind], "num_hidden_layers": 6}).to(torch.bfloat16)
    theirs.save_pretrained(tmp_path)
    tokens = ids(8, 40)
    with torch.no_grad():
        rounded = theirs(torch.tensor(tokens)).logits.float().numpy()
        truth = theirs.float()(torch.tensor(tokens)).logits.numpy()
    ours = np.asarray(Phi3ForCausalLM.from_pretrained(str(tmp_path), dtype=jnp.bfloat16)(tokens))
    error = np.sqrt(np.mean((ours - truth) ** 2))
    yardstick = np.sqrt(np.mean((rounded - truth) ** 2))
    assert 0 < error < 1.1 * yardstick


def test_frequencies(testdata: Any) -> None:
    """At position 100,000 one bit of a frequency is seen in the logits: all equal but where PyTorch
    itself rounds the power wrongly (one of the 48 of head_dim 96), and there one bit at most."""
    import transformers
    from transformers.models.phi3.modeling_phi3 import Phi3RotaryEmbedding

    from phi3_jax import Phi3Config

    for folder in sorted((testdata / "models").iterdir()):
        config = Phi3Config.from_pretrained(folder)
        reference = Phi3RotaryEmbedding(transformers.Phi3Config.from_dict(config.to_dict()))
        reference(torch.zeros(1), torch.tensor([[config.max_position_embeddings - 1]]))  # selects the long factors
        ours = inverse_frequencies(config, config.rope.long_factor)
        theirs = reference.inv_freq.numpy()
        np.testing.assert_array_max_ulp(ours, theirs, maxulp=1)
        assert np.sum(ours != theirs) <= 1, folder.name
        assert config.rope.attention_factor == reference.attention_scaling
