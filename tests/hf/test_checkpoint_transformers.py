"""What we write, transformers loads, and the other way round."""

import json

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import jax.numpy as jnp  # noqa: E402
from flax import nnx  # noqa: E402

from phi3_jax import Phi3Config  # noqa: E402
from phi3_jax.hf.checkpoint import Checkpoint  # noqa: E402
from phi3_jax.hf.layout import checkpoint_layout  # noqa: E402
from phi3_jax.hf.save import save_model  # noqa: E402
from tests.helpers.checkpoints import KINDS, model_of  # noqa: E402
from tests.helpers.references import longrope, torch_phi3  # noqa: E402

TORCH = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def assert_same_tensors(model, reference) -> None:
    state = dict(nnx.to_flat_state(nnx.state(model)))
    theirs = reference.state_dict()
    if model.config.tie_word_embeddings:
        theirs.pop("lm_head.weight")
    layout = checkpoint_layout(model.config)
    assert {entry.name for entry in layout} == set(theirs)
    for entry in layout:
        ours = state[entry.path][...] if entry.layer is None else state[entry.path][entry.layer]
        expected = theirs[entry.name].view(torch.uint8).numpy()
        np.testing.assert_array_equal(np.asarray(ours).view(np.uint8), expected, entry.name)


@pytest.mark.parametrize("dtype", TORCH)
@pytest.mark.parametrize("kind", KINDS)
def test_transformers_loads_what_we_save(tmp_path, kind, dtype):
    model = model_of(KINDS[kind], dtype=dtype)
    save_model(model, tmp_path, max_shard_size=10_000)
    loaded, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert type(loaded) is transformers.Phi3ForCausalLM
    assert loaded.dtype == TORCH[dtype]  # from config.json
    assert_same_tensors(model, loaded)


@pytest.mark.parametrize(
    "overrides",
    [{}, {"num_key_value_heads": 2}, {"tie_word_embeddings": True}, {"partial_rotary_factor": 0.75} | longrope(6)],
    ids=["mha", "gqa", "tied", "longrope"],
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("max_shard_size", ["50GB", "20KB"])
def test_we_load_what_transformers_saves(tmp_path, overrides, dtype, max_shard_size):
    reference = torch_phi3(**overrides).to(TORCH[dtype])
    reference.save_pretrained(tmp_path, max_shard_size=max_shard_size)
    model = Checkpoint.open(tmp_path).load_model(dtype=dtype)
    assert_same_tensors(model, reference)


@pytest.mark.parametrize(
    "name", ["phi-3-medium-128k-instruct", "phi-3.5-mini-instruct", "phi-4", "phi-4-mini-instruct"]
)
def test_released_configs_come_back_as_transformers_reads_them(testdata, tmp_path, name):
    """Old styles (`su`, rope_theta at the top) as well: sizes are cut down, all else is as released."""
    raw = json.loads((testdata / "models" / name / "config.json").read_text())
    head_dim = raw["hidden_size"] // raw["num_attention_heads"]
    small = {"hidden_size": 2 * head_dim, "num_attention_heads": 2, "num_key_value_heads": 1}
    ids = {"vocab_size": 20, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
    config = Phi3Config.from_dict(raw | small | ids | {"intermediate_size": 16, "num_hidden_layers": 1})
    model = model_of(json.loads(config.source), dtype=jnp.bfloat16)
    save_model(model, tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert_same_tensors(model, theirs)
    rope = theirs.config.rope_parameters
    assert rope["rope_type"] == ("longrope" if config.rope.is_longrope else "default")
    assert rope["rope_theta"] == config.rope.theta
    if config.rope.is_longrope:
        assert tuple(rope["long_factor"]) == config.rope.long_factor
        assert theirs.model.rotary_emb.attention_scaling == pytest.approx(config.rope.attention_factor, rel=1e-12)
    assert 2 * theirs.model.rotary_emb.inv_freq.shape[0] == config.rotary_dim
    assert Phi3Config.from_pretrained(tmp_path) == config
