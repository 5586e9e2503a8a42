import pytest

from phi3_jax import InputError
from phi3_jax.lora import adaptable_modules, match_targets

LAYERS = "model.layers"
ALL = (f"{LAYERS}.mlp.down_proj", f"{LAYERS}.mlp.gate_up_proj", f"{LAYERS}.self_attn.o_proj")
ALL_LINEAR = {*ALL, f"{LAYERS}.self_attn.qkv_proj"}


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        ("all-linear", ALL_LINEAR),
        ("All-Linear", ALL_LINEAR),
        (["qkv_proj"], {f"{LAYERS}.self_attn.qkv_proj"}),
        (["self_attn.qkv_proj", "down_proj"], {f"{LAYERS}.self_attn.qkv_proj", f"{LAYERS}.mlp.down_proj"}),
        (["lm_head", "embed_tokens"], {"lm_head", "model.embed_tokens"}),
        (["model.embed_tokens"], {"model.embed_tokens"}),
        ([f"{LAYERS}.{i}.mlp.down_proj" for i in range(3)], {f"{LAYERS}.mlp.down_proj"}),
        (r".*\.(qkv|o)_proj", {f"{LAYERS}.self_attn.qkv_proj", f"{LAYERS}.self_attn.o_proj"}),
        (r"model\.layers\.\d+\.mlp\..*_proj|lm_head", {*ALL[:2], "lm_head"}),
    ],
)
@pytest.mark.parametrize("tied", [False, True])
def test_targets(tiny, targets, expected, tied):
    matched = match_targets(tiny(tie_word_embeddings=tied), targets)
    assert {module.name for module in matched} == expected


def test_a_module_knows_its_names_and_shape(tiny):
    modules = {module.name: module for module in adaptable_modules(tiny())}
    qkv = modules["model.layers.self_attn.qkv_proj"]
    assert qkv.names == tuple(f"model.layers.{i}.self_attn.qkv_proj" for i in range(3))
    assert (qkv.shape, qkv.stack, qkv.is_embedding, qkv.suffix) == ((32, 16), (3,), False, "qkv_proj")
    embedding = modules["model.embed_tokens"]
    assert (embedding.names, embedding.shape, embedding.stack) == (("model.embed_tokens",), (19, 16), ())
    assert embedding.is_embedding


def test_a_model_of_one_layer_is_stacked_too(tiny):
    (module,) = match_targets(tiny(num_hidden_layers=1), ["o_proj"])
    assert module.stack == (1,)


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (
            ["q_proj"],
            r"q_proj matches nothing \(Phi-3 fuses q_proj into qkv_proj\).*choose from .*qkv_proj.*all-linear",
        ),
        (["self_attn.k_proj"], r"fuses self_attn.k_proj into qkv_proj"),
        (
            ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
            r"q_proj, k_proj, v_proj, gate_proj, up_proj match nothing .*up_proj into gate_up_proj",
        ),
        (["qkv_proj", "dense"], r"dense matches nothing; choose from"),
        (["proj"], "proj matches nothing"),  # not a suffix after a dot
        (["all-linear"], "given as a string"),
        ("qkv_proj", r"regular expression for a whole name .*goes into a list: \[qkv_proj\]"),
        (r"layers\.\d+\.mlp\.down_proj", "matches nothing"),  # found by re.search only
        ("(", "no regular expression"),
        (["norm"], "matches model.norm, which is neither a linear layer nor an embedding"),
        (["self_attn"], "matches model.layers.0.self_attn, which is neither"),
        (r"model\.layers\.[01]\.mlp\.down_proj", "matches 2 of the 3 layers of down_proj.*not supported yet"),
        (["layers.2.mlp.down_proj", "qkv_proj"], "matches 1 of the 3 layers of down_proj"),
    ],
)
def test_what_cannot_be_adapted_is_named(tiny, targets, message):
    with pytest.raises(InputError, match=message) as error:
        match_targets(tiny(), targets)
    assert "\n" not in str(error.value)
