"""Adapters that are none: each refused in one line by the command that reads it, with nothing left behind."""

import json

import numpy as np
import pytest

from tests.helpers.worlds import (
    ADAPTER,
    ADAPTER_WEIGHTS,
    both,
    cut,
    directory,
    entries,
    first,
    gone,
    header,
    linked,
    literal,
    moved_out,
    pipe,
    refusal,
    tensors,
    text,
    words_missing,
)

A = "base_model.model.model.layers.0.self_attn.o_proj.lora_A.weight"
CASES = [
    ("no config", "generate adapter", gone(ADAPTER), "adapter_config.json | cannot be read"),
    ("no config to export", "export", gone(ADAPTER), "adapter_config.json | cannot be read"),
    ("an empty config", "train on", text(ADAPTER, ""), "adapter_config.json | is not JSON"),
    ("a list", "chat adapter", text(ADAPTER, "[]"), "adapter_config.json | holds a list"),
    (
        "nesting without end",
        "info adapter",
        text(ADAPTER, "[" * 5000 + "]" * 5000),
        "adapter_config.json | nested too deep",
    ),
    ("Latin-1", "portable", text(ADAPTER, '{"a": "é"}'.encode("latin-1")), "adapter_config.json | is not UTF-8"),
    ("a name twice", "evaluate adapter", literal(ADAPTER, "r", "2"), "adapter_config.json | 'r' stands twice"),
    ("a pipe", "generate adapter", pipe(ADAPTER), "adapter_config.json | no regular file"),
    ("a folder", "export", directory(ADAPTER), "adapter_config.json | no regular file"),
    ("a link to another folder", "chat adapter", moved_out(ADAPTER), "adapter_config.json | out of its folder"),
    ("another kind", "train on", entries(ADAPTER, peft_type="IA3"), "adapter_config.json | 'IA3' | 'LORA'"),
    ("a kind that steers", "export", entries(ADAPTER, peft_type="\x1b[2J\u202e"), r"adapter_config.json | \x1b[2J"),
    ("a rank of text", "generate adapter", entries(ADAPTER, r="2"), "adapter_config.json | r is '2'"),
    ("a rank of 0", "evaluate adapter", entries(ADAPTER, r=0), "adapter_config.json | r is 0"),
    ("a rank of 10^9", "portable", entries(ADAPTER, r=10**9), "adapter_model.safetensors | 1000000000"),
    ("an alpha of 10^30", "chat adapter", entries(ADAPTER, lora_alpha="1e30"), "adapter_config.json | lora_alpha"),
    ("an infinite alpha", "export", literal(ADAPTER, "x", "Infinity"), "adapter_config.json | Infinity"),
    ("dropout of 2", "train on", entries(ADAPTER, lora_dropout=2), "adapter_config.json | lora_dropout is 2"),
    ("targets of numbers", "export", entries(ADAPTER, target_modules=[1]), "adapter_config.json | target_modules"),
    ("no targets", "generate adapter", entries(ADAPTER, target_modules=None), "adapter_config.json | target_modules"),
    ("targets that are nowhere", "chat adapter", entries(ADAPTER, target_modules=["x"]), "x matches nothing"),
    ("no expression", "export", entries(ADAPTER, target_modules="(("), "adapter_config.json | no regular expression"),
    (
        "an expression without end",
        "generate adapter",
        entries(ADAPTER, target_modules="(\\w|.)+[!?]"),
        "adapter_config.json | for ever",
    ),
    (
        "an exclusion without end",
        "train on",
        entries(ADAPTER, exclude_modules="(.|\\w)*b"),
        "adapter_config.json | exclude_modules | for ever",
    ),
    (
        "a pattern without end",
        "evaluate adapter",
        entries(ADAPTER, rank_pattern={"(?:.{1,9}){1,99}[!?]": 2}),
        "adapter_config.json | rank_pattern | for ever",
    ),
    ("a pattern of lists", "export", entries(ADAPTER, rank_pattern=[[1]]), "adapter_config.json | rank_pattern"),
    (
        "a base that is a number",
        "export",
        entries(ADAPTER, base_model_name_or_path=7),
        "adapter_config.json | base_model",
    ),
    ("a base that is nowhere", "export no base", entries(ADAPTER, base_model_name_or_path="/no/where"), "/no/where"),
    ("a start that moved the base", "train on", entries(ADAPTER, init_lora_weights="pissa"), '"pissa"'),
    ("an unknown feature", "generate adapter", entries(ADAPTER, use_magic=True), "adapter_config.json | use_magic"),
    ("layers that are not there", "export", entries(ADAPTER, layers_to_transform=[10**12]), "adapter"),
    ("no weights", "generate adapter", gone(ADAPTER_WEIGHTS), "adapter_model.safetensors"),
    (
        "a pickle",
        "export",
        both(gone(ADAPTER_WEIGHTS), text("adapter_model.bin", b"cos\n_exit\n(I99\ntR.")),
        "adapter_model.safetensors | adapter_model.bin | pickle",
    ),
    ("an empty file", "chat adapter", text(ADAPTER_WEIGHTS, ""), "adapter_model.safetensors"),
    ("half a file", "train on", cut(ADAPTER_WEIGHTS, 3000), "adapter_model.safetensors"),
    ("weights elsewhere", "benchmark adapter", moved_out(ADAPTER_WEIGHTS), "adapter_model.safetensors | elsewhere"),
    ("a header of 2^64 bytes", "export", header(ADAPTER_WEIGHTS, lambda h: h, length=2**64 - 1), "adapter_model"),
    ("an unknown dtype", "generate adapter", header(ADAPTER_WEIGHTS, first({"dtype": "X"})), "adapter_model | 'X'"),
    (
        "a missing tensor",
        "evaluate adapter",
        tensors(ADAPTER_WEIGHTS, lambda t: t.pop(A)),
        f"adapter_model.safetensors | missing | {A}",
    ),
    (
        "an unknown tensor",
        "train on",
        tensors(ADAPTER_WEIGHTS, lambda t: t.update({"\x1b[0m.weight": np.zeros(1, "f4")})),
        r"adapter_model.safetensors | unknown | \x1b[0m",
    ),
    (
        "another shape",
        "chat adapter",
        tensors(ADAPTER_WEIGHTS, lambda t: t.update({A: np.zeros((5, 5), "f4")})),
        f"misshapen | {A} is [5, 5]",
    ),
    (
        "no number",
        "portable",
        tensors(ADAPTER_WEIGHTS, lambda t: t.update({A: np.full_like(t[A], np.nan)})),
        f"not finite | {A}",
    ),
]


@pytest.mark.parametrize(("command", "damage", "words"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])
def test_adapter(command, damage, words, world, capfd):
    damage(world.adapter)
    argv = world.argv(command.removesuffix(" no base"))
    if command.endswith("no base"):
        place = argv.index("--base")
        del argv[place : place + 2]
    assert words_missing(refusal(argv, capfd, world.root), words) == []


def test_an_adapter_in_place_of_a_model(world, capfd):
    argv = ["generate", "--model", str(world.adapter), "--prompt", "a"]
    linked("tokenizer.json", str(world.base / "tokenizer.json"))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (world.adapter / name).write_bytes((world.base / name).read_bytes())
    assert words_missing(refusal(argv, capfd, world.root), "adapter | no model") == []


def test_metadata_that_makes_no_sense_is_left_aside(world, capfd):
    """Of the file's texts only our own record of slices is looked at, and where it is broken it does not count."""
    from phi3_jax.hf.safetensors_io import read_metadata

    for record in (
        "[" * 5000,
        '{"r": 1e999}',
        '{"r": 2, "lora_alpha": 4, "slices": {"x": {"q_proj": [10, "a"]}}}',
        "3",
    ):
        header(ADAPTER_WEIGHTS, lambda h, record=record: h.update({"__metadata__": {"phi3_jax": record}}))(
            world.adapter
        )
        assert read_metadata(world.adapter / ADAPTER_WEIGHTS) == {"phi3_jax": record}
        config = json.loads((world.adapter / ADAPTER).read_text())
        assert config["r"] == 2
        from phi3_jax.hf.checkpoint import Checkpoint
        from phi3_jax.peft.adapter import load_adapter

        assert load_adapter(world.adapter, Checkpoint.open(world.base).load_model(dtype="float32")).config.r == 2
