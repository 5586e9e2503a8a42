"""JSON, YAML and paths within bounds; what is shown of them on a terminal."""

import json
import math
import os

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from phi3_jax.config.lora import LoraConfig
from phi3_jax.config.model import Phi3Config
from phi3_jax.data.formats import Conversation, Prerendered, read_row
from phi3_jax.hf.safetensors_io import read_header
from phi3_jax.system.errors import InputError
from phi3_jax.system.reading import local_path, parse_json, parse_yaml, read_json, read_text

plain = st.one_of(st.none(), st.booleans(), st.integers(-(10**30), 10**30), st.floats(allow_nan=False), st.text())
finite = plain.filter(lambda value: not isinstance(value, float) or math.isfinite(value))
trees = st.recursive(
    finite, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4), max_leaves=30
)
anything = st.recursive(
    plain, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4), max_leaves=20
)


class TestJson:
    @given(value=trees)
    @settings(max_examples=100, deadline=None)
    def test_what_is_json_is_read(self, value):
        assert parse_json(json.dumps(value)) == value

    @given(text=st.text(st.sampled_from('{}[]":,0123456789.eE+-ntfINa \\u\x00x')))
    @settings(max_examples=300, deadline=None)
    def test_anything_is_a_value_or_a_value_error(self, text):
        try:
            value = parse_json(text)
        except ValueError:
            return
        assert value == json.loads(text)

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ('{"a": 1, "b": {"c": 1, "c": 2}}', "'c' stands twice"),
            ("[NaN]", "NaN"),
            ("[-Infinity]", "-Infinity"),
            ("[1e400]", "too large"),
            ("9" * 41, "too large"),
            ("[" * 51 + "]" * 51, "too deep"),
            ('{"a":' * 51 + "1" + "}" * 51, "too deep"),
            ("[" * 10**6, "too deep"),
        ],
    )
    def test_bounds(self, text, message):
        with pytest.raises(ValueError, match=message):
            parse_json(text)

    def test_just_within(self):
        assert parse_json("[" * 49 + "]" * 49)
        assert parse_json("9" * 40) == int("9" * 40)

    def test_a_byte_order_mark_is_no_harm(self, tmp_path):
        (tmp_path / "a.json").write_bytes(b'\xef\xbb\xbf{"a": 1}')
        assert read_json(tmp_path / "a.json") == {"a": 1}

    def test_size(self, tmp_path):
        with (tmp_path / "a.json").open("wb") as file:
            file.truncate(2**26 + 1)  # takes no room on the disk, and must take none in memory
        with pytest.raises(InputError, match="larger than 64 MiB"):
            read_json(tmp_path / "a.json")


class TestYaml:
    @given(value=trees)
    @settings(max_examples=60, deadline=None)
    def test_as_safe_load(self, value):
        text = yaml.safe_dump(value)
        assert parse_yaml(text) == yaml.safe_load(text)

    @given(text=st.text(st.sampled_from("{}[]&*!|>'\"%@`-?:,# \n\tab0.~<")))
    @settings(max_examples=300, deadline=None)
    def test_anything_is_a_value_or_a_value_error(self, text):
        try:
            value = parse_yaml(text)
        except ValueError:
            return
        assert value == yaml.safe_load(text)

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("a: 1\nb: {c: 1, c: 2}", "'c' stands twice, line 2"),
            ("a: &a [*a]", "within what it names"),
            ("[" * 60 + "]" * 60, "too deep"),
            ("{" * 20_000, "too deep"),
            ("- " * 200, "too deep"),
            ("a: " + "9" * 41, "too large"),
            ("a: 2024-13-45", "month"),
            ("a: !!int x", "invalid literal"),
            ("a: !!bool x", "x"),
            ("a: [1", "sequence in line 1, column 4"),
            ("!!timestamp x", "NoneType"),
            ("!!python/name:os.system", "could not determine a constructor"),
        ],
    )
    def test_bounds(self, text, message):
        with pytest.raises(ValueError, match=message):
            parse_yaml(text)

    def test_aliases_count_as_what_they_stand_for(self):
        lines = ["a0: &a0 [1, 1]", *(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]" for i in range(1, 12))]
        assert parse_yaml("\n".join(lines[:8]))["a7"]
        with pytest.raises(ValueError, match="more than 20,000 entries"):
            parse_yaml("\n".join(lines + [f"b{i}: *a11" for i in range(9)]))
        deep = ["a0: &a0 [1]", *(f"a{i}: &a{i} [*a{i - 1}]" for i in range(1, 60))]
        with pytest.raises(ValueError, match="too deep"):
            parse_yaml("\n".join(deep))

    def test_anchors_and_merges_are_still_there_for_people(self):
        assert parse_yaml("a: &a {x: 1, y: 2}\nb: {<<: *a, y: 3}")["b"] == {"x": 1, "y": 3}


class TestPaths:
    def test_links_within_the_folder_and_in_the_hubs_cache_are_followed(self, tmp_path):
        snapshot = tmp_path / "hub" / "models--a--b" / "snapshots" / "c"
        blobs, store = snapshot.parents[1] / "blobs", tmp_path / "hub" / "blobs"
        for folder in (snapshot, blobs, store):
            folder.mkdir(parents=True)
        (snapshot / "real.json").write_text('{"a": 1}')
        (snapshot / "within.json").symlink_to("real.json")
        (blobs / "x").write_text('{"a": 1}')
        (snapshot / "cached.json").symlink_to("../../blobs/x")
        (store / "y").write_text('{"a": 1}')
        (blobs / "y").symlink_to(store / "y")
        (snapshot / "shared.json").symlink_to("../../blobs/y")
        for name in ("within", "cached", "shared"):
            assert read_json(snapshot / f"{name}.json") == {"a": 1}
        # The folder itself may be a link, and be given by one.
        (tmp_path / "link").symlink_to(snapshot)
        assert read_json(tmp_path / "link" / "within.json") == {"a": 1}

    @pytest.mark.parametrize("target", ["../secret.json", "../../secret.json", "../../../secret.json", "/etc/passwd"])
    def test_links_out_of_the_folder_are_not_even_where_it_looks_like_a_cache(self, target, tmp_path):
        snapshot = tmp_path / "models--a--b" / "snapshots" / "c"
        snapshot.mkdir(parents=True)
        for folder in snapshot.parents[:3]:
            (folder / "secret.json").write_text('{"secret": 1}')
        (snapshot / "a.json").symlink_to(target)
        with pytest.raises(InputError, match="out of its folder"):
            read_json(snapshot / "a.json")

    def test_nothing_that_blocks_or_never_ends_is_opened(self, tmp_path):
        os.mkfifo(tmp_path / "pipe")
        (tmp_path / "folder").mkdir()
        (tmp_path / "circle").symlink_to("circle")
        for name in ("pipe", "folder", "circle", "none"):
            with pytest.raises(InputError, match=str(tmp_path / name)):
                read_text(tmp_path / name)

    @pytest.mark.parametrize("name", ["a" * 5000, "~nosuchuser/x", "a\0b"])
    def test_names_that_no_path_has(self, name):
        with pytest.raises(InputError, match="^model ") as caught:
            local_path(name, "model")
        assert len(str(caught.value)) < 500

    def test_nothing_is_no_path(self):
        with pytest.raises(InputError, match="model is empty, expected one; give . for this folder"):
            local_path("", "model")


# The readers themselves, with values of any type in every place.


def _fields(**types):
    return st.fixed_dictionaries({}, optional={name: values | anything for name, values in types.items()})


sizes = st.sampled_from([1, 2, 8, 32, 64])
configs = _fields(
    vocab_size=sizes,
    hidden_size=sizes,
    num_hidden_layers=sizes,
    num_attention_heads=sizes,
    num_key_value_heads=sizes,
    head_dim=sizes,
    max_position_embeddings=sizes,
    original_max_position_embeddings=sizes,
    rms_norm_eps=st.just(1e-5),
    eos_token_id=st.just([1, 2]),
    partial_rotary_factor=st.just(0.5),
    rope_scaling=_fields(
        type=st.sampled_from(["su", "longrope"]),
        short_factor=st.lists(st.floats(1, 9)),
        long_factor=st.lists(st.floats(1, 9)),
        factor=st.just(4.0),
    ),
)


@given(raw=configs)
@settings(max_examples=200, deadline=None)
def test_config(raw):
    try:
        config = Phi3Config.from_dict({"model_type": "phi3", **raw})
    except InputError:
        return
    assert Phi3Config.from_dict(config.to_dict()) == config
    assert config.rotary_dim % 2 == 0


@given(
    raw=_fields(
        r=sizes,
        lora_alpha=sizes,
        target_modules=st.just(["qkv_proj"]),
        rank_pattern=st.dictionaries(st.text(), sizes),
        layers_to_transform=st.lists(sizes),
        modules_to_save=st.just(["lm_head"]),
        trainable_token_indices=st.lists(st.integers(0, 9)),
        init_lora_weights=st.sampled_from([True, "gaussian", "eva"]),
        eva_config=st.just({"rho": 2.0}),
    )
)
@settings(max_examples=200, deadline=None)
def test_lora_config(raw):
    try:
        config = LoraConfig(**raw)
    except InputError:
        return
    assert hash(config) == hash(LoraConfig(**raw))


turns = st.lists(_fields(role=st.sampled_from(["user", "assistant"]), content=st.text(), weight=st.just(0)), max_size=3)


@given(
    row=_fields(
        messages=turns, conversations=turns, prompt=st.text(), completion=st.text(), instruction=st.text(),
        output=st.text(), text=st.text(), system=st.text(),
    )
)  # fmt: skip
@settings(max_examples=300, deadline=None)
def test_row(row):
    try:
        example = read_row(row, "row 1")
    except InputError as error:
        assert str(error).startswith("row 1")  # noqa: PT017
        return
    texts = [turn.content for turn in example.turns] if isinstance(example, Conversation) else [example.text]
    assert isinstance(example, Conversation | Prerendered)
    "".join(texts).encode()  # all of it is text, without halves of surrogates


@given(
    header=st.dictionaries(
        st.text(max_size=5),
        _fields(
            dtype=st.sampled_from(["F32", "F16", "I64", "F8_E4M3"]),
            shape=st.lists(st.integers(0, 4), max_size=3),
            data_offsets=st.lists(st.integers(0, 64), min_size=2, max_size=2),
        ),
        max_size=3,
    )
    | anything,
    more=st.binary(max_size=64),
)
@settings(max_examples=300, deadline=None)
def test_safetensors_header(header, more, tmp_path_factory):
    file = tmp_path_factory.getbasetemp() / "header.safetensors"
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + more)
    try:
        entries = read_header(file)
    except InputError:
        return
    # What is taken lies within the file, one tensor behind the other.
    places = sorted((entry.start, math.prod(entry.shape)) for entry in entries.values())
    assert all(8 + len(text) <= start <= 8 + len(text) + len(more) for start, _ in places)
