import pytest

from phi3_jax import InputError, LoraConfig
from phi3_jax.lora import adaptable_modules, config_targets, match_targets
from phi3_jax.lora.targets import saved_modules

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


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (r"model\.layers\.[01]\.mlp\.down_proj", {"model.layers.mlp.down_proj": (0, 1)}),
        (
            ["layers.2.mlp.down_proj", "o_proj"],
            {"model.layers.mlp.down_proj": (2,), "model.layers.self_attn.o_proj": (0, 1, 2)},
        ),
        ([f"{LAYERS}.1.self_attn.k_proj"], {"model.layers.self_attn.k_proj": (1,)}),
        (r".*\.1\..*(q|o)_proj", {"model.layers.self_attn.q_proj": (1,), "model.layers.self_attn.o_proj": (1,)}),
    ],
)
def test_some_layers_of_a_module(tiny, targets, expected):
    matched = match_targets(tiny(), targets)
    assert {module.name: module.layers for module in matched} == expected
    for module in matched:
        assert module.names == tuple(f"model.layers.{i}{module.name[12:]}" for i in module.layers)


def test_slices_of_fused_layers(tiny):
    names = ["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"]
    qkv, mlp = "model.layers.self_attn.qkv_proj", "model.layers.mlp.gate_up_proj"
    found = [(m.suffix, m.parent, (m.rows.start, m.rows.stop), m.shape) for m in match_targets(tiny(), names)]
    assert sorted(found) == [  # 4 query heads of 4, 2 of keys and values
        ("gate_proj", mlp, (0, 28), (28, 16)),
        ("k_proj", qkv, (16, 24), (8, 16)),
        ("q_proj", qkv, (0, 16), (16, 16)),
        ("up_proj", mlp, (28, 56), (28, 16)),
        ("v_proj", qkv, (24, 32), (8, 16)),
    ]


def configured(model, **settings):
    settings = {"target_modules": ["qkv_proj", "down_proj"], **settings}
    return {module.suffix: module.layers for module in config_targets(model, LoraConfig(**settings))}


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"exclude_modules": ["down_proj"]}, {"qkv_proj": (0, 1, 2)}),
        ({"exclude_modules": ["layers.1.mlp.down_proj"]}, {"qkv_proj": (0, 1, 2), "down_proj": (0, 2)}),
        ({"exclude_modules": r".*\.[02]\..*"}, {"qkv_proj": (1,), "down_proj": (1,)}),
        ({"layers_to_transform": 2}, {"qkv_proj": (2,), "down_proj": (2,)}),
        ({"layers_to_transform": [0, 2], "layers_pattern": "layers"}, {"qkv_proj": (0, 2), "down_proj": (0, 2)}),
        ({"modules_to_save": ["down_proj"]}, {"qkv_proj": (0, 1, 2)}),
        ({"target_modules": ["q_proj", "o_proj"], "modules_to_save": ["qkv_proj"]}, {"o_proj": (0, 1, 2)}),
    ],
)
def test_what_a_configuration_leaves(tiny, settings, expected):
    assert configured(tiny(), **settings) == expected


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"exclude_modules": ["o_proj"]}, "exclude_modules: o_proj excludes none of the target modules"),
        ({"exclude_modules": ".*o_proj"}, "exclude_modules: .*o_proj excludes none"),
        ({"exclude_modules": ".*"}, "nothing is left of it after exclude_modules"),
        ({"layers_to_transform": [0, 3]}, "layers_to_transform has 3, but the model has 3 layers, 0 to 2"),
        (
            {"layers_to_transform": 0, "target_modules": ["o_proj", "lm_head"]},
            "lm_head of target_modules is in no layer",
        ),
        ({"r": 10**9}, r"peft.r is 1,000,000,000 for model.layers.0.mlp.down_proj \(\d+×\d+\), which has updates"),
        ({"r": 8, "rank_pattern": {"down_proj": 257}}, "peft.r is 257 for model.layers.0.mlp.down_proj"),
        ({"rank_pattern": {"o_proj": 4}}, "rank_pattern: 'o_proj' matches none of the modules with adapters"),
        ({"alpha_pattern": {"proj": 4}}, "alpha_pattern: 'proj' matches none"),
        ({"rank_pattern": {".*": 4, "down_proj": 2}}, "'down_proj' matches none .* no earlier key"),
        ({"modules_to_save": ["norms"]}, "modules_to_save: norms matches nothing; choose from .*lm_head"),
        ({"modules_to_save": ["layers.0.mlp.down_proj"]}, "matches 1 of the 3 layers of model.layers.mlp.down_proj"),
        ({"target_modules": ["qkv_proj", "k_proj"]}, "names both qkv_proj and k_proj, a slice of it; leave one out"),
        ({"target_modules": ["q_proj", "v_proj"], "use_dora": True}, "use_dora .* all of q_proj, k_proj, v_proj"),
    ],
)
def test_what_a_configuration_cannot_mean(tiny, settings, message):
    with pytest.raises(InputError, match=message) as error:
        configured(tiny(), **settings)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "settings",
    [{"target_modules": ["o_proj", "embed_tokens"]}, {"target_modules": ".*head"}, {"modules_to_save": ["lm_head"]}],
)
def test_one_adapter_for_both_ends_of_a_shared_table_is_refused(tiny, settings):
    config = LoraConfig(ensure_weight_tying=True, **settings)
    with pytest.raises(InputError, match="ensure_weight_tying is true, and (embed_tokens|lm_head) of this model"):
        config_targets(tiny(tie_word_embeddings=True), config)
    apart = config_targets(tiny(), config)
    assert apart == config_targets(tiny(), LoraConfig(**settings))
    inside = {"target_modules": "all-linear"}
    tied = tiny(tie_word_embeddings=True)
    found = config_targets(tied, LoraConfig(ensure_weight_tying=True, **inside))
    assert found == config_targets(tied, LoraConfig(**inside))


def test_dora_on_every_slice_of_a_layer(tiny):
    assert len(configured(tiny(), target_modules=["q_proj", "k_proj", "v_proj"], use_dora=True)) == 3


def test_modules_to_save_are_named_as_in_peft(tiny):
    model = tiny()
    layer = "model.layers"
    norms = [f"{layer}.input_layernorm", f"{layer}.post_attention_layernorm", "model.norm"]
    assert saved_modules(model, ["lm_head"]) == ["lm_head"]
    assert saved_modules(model, ["norm"]) == norms  # PEFT's rule is `endswith`
    assert saved_modules(model, ["mlp"]) == [f"{layer}.mlp.down_proj", f"{layer}.mlp.gate_up_proj"]
    assert saved_modules(tiny(tie_word_embeddings=True), ["lm_head"]) == ["lm_head"]


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
        (["qkv_proj", "dense"], r"dense matches nothing; choose from"),
        (["proj"], "proj matches nothing"),  # not a suffix after a dot
        (["all-linear"], "given as a string"),
        ("qkv_proj", r"regular expression for a whole name .*goes into a list: \[qkv_proj\]"),
        (r"layers\.\d+\.mlp\.down_proj", "matches nothing"),  # found by re.search only
        ("(", "no regular expression"),
        (["norm"], "matches model.norm, which is neither a linear layer nor an embedding"),
        (["self_attn"], "matches model.layers.0.self_attn, which is neither"),
    ],
)
def test_what_cannot_be_adapted_is_named(tiny, targets, message):
    with pytest.raises(InputError, match=message) as error:
        match_targets(tiny(), targets)
    assert "\n" not in str(error.value)
