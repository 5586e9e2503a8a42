"""PEFT's files without PEFT: what is written, and that nothing wrong is read."""

import json
import struct
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import yaml
from safetensors import numpy as safetensors

from phi3_jax import InputError, LoraConfig, Phi3ForCausalLM
from phi3_jax.config.hub_options import Hub
from phi3_jax.hf.checkpoint import Checkpoint
from phi3_jax.hf.save import save_model
from phi3_jax.lora import Lora, LoraLinear, init_lora
from phi3_jax.peft.adapter import PeftAdapter, load_adapter
from phi3_jax.peft.config import read_adapter_config
from phi3_jax.peft.save import save_adapter
from tests.helpers.models import smallest_model

EVERYTHING = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj", "lm_head", "embed_tokens"]
HEAD = "base_model.model.lm_head"


@pytest.fixture(scope="module")
def model() -> Phi3ForCausalLM:
    return smallest_model()


def make_lora(model: Phi3ForCausalLM, seed: int = 0, **config: Any) -> Lora:
    settings = {"r": 2, "lora_alpha": 8, "init_lora_weights": False, **config}
    return init_lora(model, LoraConfig(**settings), jax.random.key(seed))


@pytest.fixture
def saved(model, tmp_path) -> Path:
    """A folder with an adapter for the output head and down_proj, to spoil."""
    save_adapter(tmp_path / "adapter", make_lora(model, target_modules=["lm_head", "down_proj"]))
    return tmp_path / "adapter"


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_tensors(folder: Path, **changes: np.ndarray | None) -> None:
    """Sets, or with None takes out, tensors named with / for each dot."""
    path = folder / "adapter_model.safetensors"
    tensors = safetensors.load_file(path)
    for name, value in changes.items():
        if value is None:
            del tensors[name.replace("/", ".")]
        else:
            tensors[name.replace("/", ".")] = value
    safetensors.save_file(tensors, path)


def error_of(folder: Path, model: Phi3ForCausalLM) -> str:
    with pytest.raises(InputError) as error:
        load_adapter(folder, model)
    message = str(error.value)
    assert "\n" not in message
    assert str(folder) in message
    return message


def assert_equal(a: Lora, b: Lora) -> None:
    pairs = dict(a.items()), dict(b.items())
    assert pairs[0].keys() == pairs[1].keys()
    for name, adapter in pairs[0].items():
        other = pairs[1][name]
        assert jax.tree.structure(adapter) == jax.tree.structure(other)  # scale and dropout too
        for x, y in zip(jax.tree.leaves(adapter), jax.tree.leaves(other), strict=True):
            assert x.dtype == y.dtype == jnp.float32
            np.testing.assert_array_equal(x, y)


# What is written


@pytest.mark.parametrize("rslora", [False, True])
def test_round_trip(model, tmp_path, rslora):
    lora = make_lora(model, target_modules=EVERYTHING, use_rslora=rslora, lora_dropout=0.1, lora_alpha=2.5)
    save_adapter(tmp_path, lora, base_model_name_or_path="owner/base")
    loaded = load_adapter(tmp_path, model)
    assert_equal(loaded, lora)
    assert set(loaded.config.target_modules) == set(EVERYTHING)
    assert loaded.config.base_model_name_or_path == "owner/base"
    assert (loaded.config.use_rslora, loaded.config.lora_alpha) == (rslora, 2.5)


def test_names_and_shapes_in_the_file(model, tmp_path):
    save_adapter(tmp_path, make_lora(model, target_modules=EVERYTHING))
    path = tmp_path / "adapter_model.safetensors"
    tensors = safetensors.load_file(path)
    layer = {
        "self_attn.qkv_proj": (32, 16),
        "self_attn.o_proj": (16, 16),
        "mlp.gate_up_proj": (56, 16),
        "mlp.down_proj": (16, 28),
    }
    expected = {f"{HEAD}.lora_A.weight": (2, 16), f"{HEAD}.lora_B.weight": (19, 2)}
    expected["base_model.model.model.embed_tokens.lora_embedding_A"] = (2, 19)
    expected["base_model.model.model.embed_tokens.lora_embedding_B"] = (16, 2)
    for i in range(3):
        for name, (out_features, in_features) in layer.items():
            expected[f"base_model.model.model.layers.{i}.{name}.lora_A.weight"] = (2, in_features)
            expected[f"base_model.model.model.layers.{i}.{name}.lora_B.weight"] = (out_features, 2)
    assert {name: tensor.shape for name, tensor in tensors.items()} == expected
    assert {tensor.dtype for tensor in tensors.values()} == {np.dtype(np.float32)}
    content = path.read_bytes()
    header = json.loads(content[8 : 8 + struct.unpack("<Q", content[:8])[0]])
    assert header["__metadata__"] == {"format": "pt"}


def test_config_is_sorted_explicit_and_names_the_modules(model, tmp_path):
    save_adapter(tmp_path, make_lora(model, target_modules="all-linear", base_model_name_or_path="owner/base"))
    text = (tmp_path / "adapter_config.json").read_text()
    raw = json.loads(text)
    assert text == json.dumps(raw, indent=2, sort_keys=True)
    assert raw["target_modules"] == ["down_proj", "gate_up_proj", "o_proj", "qkv_proj"]
    chosen = {name: raw[name] for name in ("peft_type", "task_type", "r", "lora_alpha", "base_model_name_or_path")}
    assert chosen == {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": 2,
        "lora_alpha": 8,
        "base_model_name_or_path": "owner/base",
    }
    assert isinstance(raw["lora_alpha"], int)


def test_model_card(model, tmp_path):
    lora = make_lora(model, use_rslora=True)
    save_adapter(tmp_path, lora, base_model_name_or_path="123")  # a number to YAML, unless it is quoted
    card = (tmp_path / "README.md").read_text()
    _, front, body = card.split("---\n", 2)
    assert yaml.safe_load(front) == {
        "base_model": "123",
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": ["base_model:adapter:123", "lora", "phi3", "phi3_jax"],
    }
    assert "PeftModel.from_pretrained" in body
    assert "p3.load_adapter" in body
    assert "α/√r" in body
    for nowhere in (None, 'odd: "name"', str(tmp_path)):  # the hub takes no card that names such a base
        save_adapter(tmp_path, lora, base_model_name_or_path=nowhere)
        assert "base_model" not in yaml.safe_load((tmp_path / "README.md").read_text().split("---\n")[1])


class Tokenizer:
    def save_pretrained(self, folder: Path) -> None:
        (folder / "tokenizer.json").write_text("{}")
        (folder / "additional_chat_templates").mkdir()
        (folder / "additional_chat_templates" / "tool.jinja").write_text("x")


def test_the_tokenizer_goes_along_and_a_second_save_replaces_the_first(model, tmp_path):
    folder = tmp_path / "runs" / "adapter"
    save_adapter(folder, make_lora(model), tokenizer=Tokenizer())
    (folder / "notes.txt").write_text("mine")
    second = make_lora(model, seed=1, r=3)
    save_adapter(folder, second, tokenizer=Tokenizer())
    assert_equal(load_adapter(folder, model), second)
    assert (folder / "additional_chat_templates" / "tool.jinja").read_text() == "x"
    assert (folder / "notes.txt").read_text() == "mine"
    assert [path.name for path in folder.parent.iterdir()] == ["adapter"]  # nothing temporary is left


def test_an_interrupted_save_leaves_the_old_adapter_or_none(model, tmp_path, monkeypatch):
    first = make_lora(model)
    save_adapter(tmp_path / "adapter", first)

    class Broken:
        def save_pretrained(self, folder: Path) -> None:
            raise RuntimeError("no tokenizer today")

    with pytest.raises(RuntimeError):
        save_adapter(tmp_path / "adapter", make_lora(model, seed=1), tokenizer=Broken())
    assert_equal(load_adapter(tmp_path / "adapter", model), first)

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("os.replace", stop)
    with pytest.raises(KeyboardInterrupt):
        save_adapter(tmp_path / "adapter", make_lora(model, seed=1))
    monkeypatch.undo()
    assert "adapter_config.json" in error_of(tmp_path / "adapter", model)
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_a_file_in_the_way(model, tmp_path):
    (tmp_path / "adapter").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        save_adapter(tmp_path / "adapter", make_lora(model))
    with pytest.raises(InputError, match="cannot be written"):
        save_adapter(tmp_path / "adapter" / "below", make_lora(model))


def test_what_an_adapter_is_counts_not_what_its_configuration_says(model, tmp_path):
    lora = make_lora(model, target_modules=["lm_head"])
    other = LoraLinear(lora.adapters["lm_head"].lora_A[:1], lora.adapters["lm_head"].lora_B[:, :1], scaling=1.5)
    save_adapter(tmp_path, Lora({"lm_head": other}, lora.config))
    raw = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (raw["r"], raw["lora_alpha"]) == (1, 1.5)
    loaded = load_adapter(tmp_path, model)
    assert_equal(loaded, Lora({"lm_head": other}, loaded.config))


# What is read


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_half_precision_files_become_float32(model, saved, dtype):
    tensors = {name: np.asarray(t, dtype) for name, t in _tensors(saved).items()}
    _write_raw(saved / "adapter_model.safetensors", tensors)
    head = load_adapter(saved, model).adapters["lm_head"]
    assert head.lora_A.dtype == jnp.float32
    np.testing.assert_array_equal(head.lora_A, tensors[f"{HEAD}.lora_A.weight"].astype(np.float32))


def _tensors(folder: Path) -> dict[str, np.ndarray]:
    return safetensors.load_file(folder / "adapter_model.safetensors")


def _write_raw(path: Path, tensors: dict[str, np.ndarray]) -> None:
    names = {"float16": "F16", "bfloat16": "BF16"}
    header, data = {}, b""
    for name, tensor in tensors.items():
        offsets = [len(data), len(data) + tensor.nbytes]
        header[name] = {"dtype": names[tensor.dtype.name], "shape": tensor.shape, "data_offsets": offsets}
        data += tensor.tobytes()
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def test_all_that_is_wrong_with_the_tensors_is_said_at_once(model, saved):
    edit_tensors(
        saved,
        **{
            f"{HEAD}.lora_A.weight": None,
            f"{HEAD}.lora_B.weight": np.zeros((20, 2), np.float32),
            f"{HEAD}.lora_C.weight": np.zeros(1, np.float32),
            "base_model.model.model.layers.1.mlp.down_proj.lora_A.weight": np.zeros((2, 28), np.int32),
        },
    )
    message = error_of(saved, model)
    for part in (
        f"1 missing ({HEAD}.lora_A.weight)",
        f"1 unknown ({HEAD}.lora_C.weight)",
        f"1 misshapen ({HEAD}.lora_B.weight is [20, 2], expected [19, 2])",
        "1 of the wrong type (base_model.model.model.layers.1.mlp.down_proj.lora_A.weight is I32)",
    ):
        assert part in message


def test_a_long_list_is_cut(model, saved):
    edit_config(saved, target_modules=["lm_head", "down_proj", "qkv_proj"])
    assert "6 missing (" in error_of(saved, model)
    assert " and 3 more)" in error_of(saved, model)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_numbers_that_are_none(model, saved, value):
    array = np.zeros((2, 16), np.float32)
    array[1, 3] = value
    edit_tensors(saved, **{f"{HEAD}.lora_A.weight": array})
    assert f"1 not finite ({HEAD}.lora_A.weight)" in error_of(saved, model)


def test_the_rank_in_the_config_must_be_the_tensors(model, saved):
    edit_config(saved, r=4)
    assert "8 misshapen" in error_of(saved, model)


def test_an_adapter_of_another_model(saved):
    smaller = smallest_model(num_hidden_layers=2)
    assert "2 unknown (base_model.model.model.layers.2.mlp.down_proj" in error_of(saved, smaller)
    edit_config(saved, base_model_name_or_path="someone/base")
    with pytest.raises(InputError) as error:
        PeftAdapter.open(saved).load(smaller, Checkpoint("another/base", saved, Hub()))
    message = str(error.value)
    assert message.startswith(
        f"{saved / 'adapter_model.safetensors'}: was trained on someone/base, not on another/base: "
    )
    assert message.count("base_model.model") == 1
    # Of the very base the file itself is at fault, and all that is wrong is said.
    with pytest.raises(InputError, match=r"adapter_model.safetensors: tensors do not fit the model and"):
        PeftAdapter.open(saved).load(smaller, Checkpoint("someone/base", saved, Hub()))


@pytest.mark.parametrize("name", [f"{HEAD}.base_layer.weight", f"{HEAD}.weight"])
def test_the_bases_own_tables_may_lie_beside_but_not_changed(model, saved, name):
    before = load_adapter(saved, model)
    weight = np.array(model.lm_head.weight[...])
    edit_tensors(saved, **{name: weight})
    assert_equal(load_adapter(saved, model), before)
    weight[0, 0] += 1e-3
    edit_tensors(saved, **{name: weight})
    assert f"1 not the base's, though modules_to_save does not name them ({name})" in error_of(saved, model)


def test_a_copy_is_the_bases_whatever_either_has_been_rounded_to(saved, tmp_path):
    name = f"{HEAD}.base_layer.weight"
    before = load_adapter(saved, smallest_model())
    for dtype in (jnp.float32, jnp.bfloat16):
        model = smallest_model(dtype)
        weight = np.array(model.lm_head.weight[...])
        for copy in (weight.astype(np.float32), weight.astype(ml_dtypes.bfloat16)):
            edit_tensors(saved, **{name: copy})
            assert_equal(load_adapter(saved, model), before)
        # Held against the files where the model has shapes alone.
        save_model(model, tmp_path / str(dtype))
        base = Checkpoint.open(tmp_path / str(dtype))
        adapter = PeftAdapter.open(saved)
        assert adapter.has_base_copies
        assert_equal(adapter.load(base.shapes, base), before)
        edit_tensors(saved, **{name: weight.astype(np.float32) * 2})
        with pytest.raises(InputError, match="1 not the base's"):
            adapter.load(base.shapes, base)


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_biases_that_phi_3_does_not_have(model, saved, bias):
    before = load_adapter(saved, model)
    edit_config(saved, bias=bias, ensure_weight_tying=True)  # nor has this base weights that are tied
    assert_equal(load_adapter(saved, model), before)


@pytest.mark.parametrize(
    "given", [{"target_modules": ["o_proj", "embed_tokens"]}, {"target_modules": ["o_proj", "lm_head"]}]
)
def test_what_peft_ties_has_tensors_at_both_ends(tmp_path, given):
    model = smallest_model(tie_word_embeddings=True)
    lora = make_lora(model, target_modules=["o_proj", "lm_head", "embed_tokens"])
    save_adapter(tmp_path, lora)
    edit_config(tmp_path, ensure_weight_tying=True, **given)
    assert_equal(load_adapter(tmp_path, model), lora)
    edit_config(tmp_path, ensure_weight_tying=False)
    assert "2 unknown" in error_of(tmp_path, model)


def test_names_in_full_as_peft_writes_them_for_small_models(model, saved):
    before = load_adapter(saved, model)
    names = [f"model.layers.{i}.mlp.down_proj" for i in range(3)]
    edit_config(saved, target_modules=["lm_head", *names])
    assert_equal(load_adapter(saved, model), before)
    edit_config(saved, target_modules=["lm_head", *names[:2]])
    assert "2 unknown (base_model.model.model.layers.2.mlp.down_proj.lora_A.weight" in error_of(saved, model)


@pytest.mark.parametrize(
    ("entry", "value"),
    [
        ("bias", "some"),
        ("megatron_config", {"a": 1}),
        ("layer_replication", [[0, 2]]),
        ("use_qalora", True),
        ("alora_invocation_tokens", [1]),
        ("target_parameters", ["weight"]),
        ("fan_in_fan_out", True),
        ("use_bdlora", {"nblocks": 2}),
        ("a_feature_of_next_year", "on"),
        ("task_type", "SEQ_CLS"),
    ],
)
def test_features_that_are_not_supported_are_named(model, saved, entry, value):
    edit_config(saved, **{entry: value})
    assert f"not supported yet: {entry} {json.dumps(value)}" in error_of(saved, model)


def test_several_unsupported_features_are_named_together(model, saved):
    edit_config(saved, use_qalora=True, fan_in_fan_out=True)
    assert "fan_in_fan_out true, use_qalora true" in error_of(saved, model)


@pytest.mark.parametrize(
    ("start", "way"),
    [
        ("pissa", "path_initial_model_for_weight_conversion"),
        ("pissa_niter_4", "path_initial_model_for_weight_conversion"),
        ("olora", "path_initial_model_for_weight_conversion"),
        ("corda", "path_initial_model_for_weight_conversion"),
        ("loftq", "merge it into that base"),
        (1, "path_initial_model_for_weight_conversion"),  # 1 == True, but is no start
    ],
)
def test_starts_that_changed_the_base_are_refused(model, saved, start, way):
    edit_config(saved, init_lora_weights=start)
    message = error_of(saved, model)
    assert f"init_lora_weights is {json.dumps(start)}" in message
    assert way in message


@pytest.mark.parametrize("start", [True, False, None, "gaussian", "orthogonal", "eva"])
def test_starts_that_left_the_base_alone(model, saved, start):
    before = load_adapter(saved, model)
    edit_config(saved, init_lora_weights=start, eva_config={"rho": 1.0}, corda_config={"a": 1}, loftq_config={"b": 2})
    assert_equal(load_adapter(saved, model), before)


def test_entries_that_change_nothing_are_let_pass(model, saved):
    before = load_adapter(saved, model)
    edit_config(
        saved,
        a_feature_of_next_year=None,
        another={},
        third=False,
        peft_version="9.9",
        megatron_core="megatron.core",
        revision="main",
        inference_mode=False,
        task_type=None,
        auto_mapping={"base_model_class": "Phi3ForCausalLM"},
    )
    assert_equal(load_adapter(saved, model), before)


def test_what_pefts_defaults_are(model, saved):
    """An entry left out means PEFT's default, which is not always ours."""
    path = saved / "adapter_config.json"
    path.write_text(json.dumps({"peft_type": "LORA", "target_modules": ["lm_head"]}))
    config = read_adapter_config(saved)
    assert (config.r, config.lora_alpha, config.lora_dropout, config.use_rslora) == (8, 8, 0.0, False)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "is not JSON"),
        (b"\xff\xfe", "is not UTF-8"),
        (b"[1]", "holds a list"),
        (b"{}", "peft_type is None, expected 'LORA'"),
        (b'{"peft_type": "LORA"}', "target_modules is not given"),
        (b'{"peft_type": "LORA", "target_modules": ["q_proj"]}', "are parts of fused layers"),
        (b'{"peft_type": "LORA", "target_modules": ["lm_head"], "r": "8"}', "peft.r is '8'"),
        (b'{"peft_type": "LORA", "target_modules": ["head"]}', "head matches nothing"),
        (b'{"peft_type": "LORA", "target_modules": {"a": 1}}', "peft.target_modules is"),
    ],
)
def test_broken_configs(model, saved, content, message):
    (saved / "adapter_config.json").write_bytes(content)
    assert message in error_of(saved, model)


def test_a_pickle_is_refused(model, saved):
    (saved / "adapter_model.safetensors").rename(saved / "adapter_model.bin")
    assert "found only adapter_model.bin (a pickle" in error_of(saved, model)


def test_a_truncated_file(model, saved):
    path = saved / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    assert "cut off" in error_of(saved, model)


def test_no_such_folder(model, tmp_path):
    with pytest.raises(InputError, match="no such folder"):
        load_adapter(tmp_path / "nothing" / "here", model)


# Real files


def test_the_config_of_a_real_phi3_adapter(testdata):
    config = read_adapter_config(testdata / "adapters" / "phi-3-mini-4k_r16_all-fused")
    assert config == LoraConfig(
        r=16,
        lora_alpha=32,
        lora_dropout=0.05,
        target_modules=("gate_up_proj", "down_proj", "qkv_proj", "o_proj"),
        base_model_name_or_path="microsoft/Phi-3-mini-4k-instruct",
    )


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("adalora__llama-3.2-3B-rank32", "peft_type is 'ADALORA'"),
        ("ia3__llama-3.2-3B-default", "peft_type is 'IA3'"),
        ("loha__llama-3.2-3B-rank32", "peft_type is 'LOHA'"),
        ("prompt_tuning__llama-3.2-3B-default", "peft_type is 'PROMPT_TUNING'"),
        ("trainable_tokens__llama-3.2-3B-sos+eos", "peft_type is 'TRAINABLE_TOKENS'"),
        ("vera__llama-3.2-3B-default", "peft_type is 'VERA'"),
        ("lora__llama-3.2-3B-rank32-dora", "target_modules is not given"),
        ("lora__llama-3.2-3B-rank32-kasa", "not supported yet: kasa_config {"),
        ("lora__llama-3.2-3B-rank14-target-mlp-bdlora", "not supported yet: use_bdlora {"),
        ("lora__llama-3.2-3B-rank32", "target_modules is not given"),
        ("lora__llama-3.2-3B-rank10-target-mlp", "0 bytes are no whole safetensors file"),
    ],
)
def test_real_configs_that_are_refused(model, testdata, tmp_path, name, message):
    source = testdata / "adapters" / "peft_official" / f"{name}.adapter_config.json"
    (tmp_path / "adapter_config.json").write_bytes(source.read_bytes())
    (tmp_path / "adapter_model.safetensors").write_bytes(b"")
    assert message in error_of(tmp_path, model)
