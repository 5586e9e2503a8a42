"""Checkpoints that are none: each refused in one line by the command that reads it, with nothing left behind."""

import numpy as np
import pytest

from tests.helpers.worlds import (
    CONFIG,
    WEIGHTS,
    both,
    cut,
    directory,
    entries,
    first,
    gone,
    header,
    index,
    linked,
    literal,
    moved_out,
    pipe,
    refusal,
    tensors,
    text,
    words_missing,
)

GENERATION, TOKENIZER, TOKENIZER_CONFIG = "generation_config.json", "tokenizer.json", "tokenizer_config.json"
DEEP = "[" * 5000 + "]" * 5000
# Rust's library cuts the prefix off the parts of a merge, however long they are.
PANICS = {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": ["a b"], "continuing_subword_prefix": "x" * 50}
FAR = {"type": "BPE", "vocab": {"a": 0, "b": 2**31}, "merges": []}
DOUBLING_STEP = {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}
DOUBLINGS = {"type": "Sequence", "normalizers": [DOUBLING_STEP] * 40}
DECODERS = {"type": "Sequence", "decoders": [DOUBLING_STEP] * 40}
BOMB = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
DOUBLING = (
    "{% set ns = namespace(x='xxxxxxxx') %}{% for m in range(64) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}{{ ns.x }}"
)

# What is wrong, the command that meets it, the damage, and words of the line.
CONFIGS = [
    ("no config.json", "info", gone(CONFIG), "base | config.json"),
    ("no config.json to plan with", "plan", gone(CONFIG), "config.json | cannot be read"),
    ("an empty config.json", "train", text(CONFIG, ""), "config.json | is not JSON"),
    ("a list", "evaluate", text(CONFIG, "[1]"), "config.json | holds a list"),
    ("a number", "plan", text(CONFIG, "7"), "config.json | holds a int"),
    ("nesting without end", "generate", text(CONFIG, DEEP), "config.json | nested too deep"),
    ("nesting in an entry", "plan", literal(CONFIG, "x", "[" * 60 + "]" * 60), "config.json | nested too deep"),
    ("UTF-16", "chat", text(CONFIG, '{"a": 1}'.encode("utf-16")), "config.json | is not UTF-8"),
    ("a name twice", "train", literal(CONFIG, "hidden_size", "32"), "config.json | 'hidden_size' stands twice"),
    ("NaN", "evaluate", literal(CONFIG, "x", "NaN"), "config.json | NaN"),
    ("an infinite number", "plan", literal(CONFIG, "x", "1e999"), "config.json | 1e999 is too large"),
    ("a number of 5,000 digits", "info", literal(CONFIG, "x", "9" * 5000), "config.json | is too large"),
    ("a folder in its place", "info", directory(CONFIG), "config.json | no regular file"),
    ("a pipe in its place", "train", pipe(CONFIG), "config.json | no regular file"),
    ("an endless device", "plan", linked(CONFIG, "/dev/zero"), "config.json | /dev/zero | out of its folder"),
    ("a link to another folder", "export", moved_out(CONFIG), "config.json | elsewhere | out of its folder"),
    ("a link to itself", "plan", linked(CONFIG, CONFIG), "config.json"),
    ("another kind of model", "benchmark", entries(CONFIG, model_type="llama"), "config.json | 'llama' | 'phi3'"),
    ("a kind that is no text", "plan", entries(CONFIG, model_type={"a": 1}), "config.json | model_type"),
    ("a size that is text", "train", entries(CONFIG, hidden_size="32"), "config.json | hidden_size is '32'"),
    ("a size of 0", "benchmark train", entries(CONFIG, num_hidden_layers=0), "config.json | num_hidden_layers is 0"),
    ("10^9 layers", "info", entries(CONFIG, num_hidden_layers=10**9), "config.json | num_hidden_layers is 1000000000"),
    ("10^15 tokens", "plan", entries(CONFIG, vocab_size=10**15), "config.json | vocab_size"),
    ("10^30 tokens", "plan", entries(CONFIG, hidden_size=10**30), "config.json | hidden_size"),
    ("heads that share unevenly", "info", entries(CONFIG, num_key_value_heads=3), "config.json | 3 key-value heads"),
    ("an odd head_dim", "plan", entries(CONFIG, head_dim=7), "config.json | head_dim 7"),
    ("an unknown activation", "plan", entries(CONFIG, hidden_act=["silu"]), "config.json | hidden_act"),
    ("an epsilon that is text", "train", entries(CONFIG, rms_norm_eps="tiny"), "config.json | rms_norm_eps is 'tiny'"),
    ("tying that is text", "train", entries(CONFIG, tie_word_embeddings="no"), "config.json | tie_word_embeddings"),
    ("a window of text", "plan", entries(CONFIG, sliding_window="wide"), "config.json | sliding_window"),
    ("an end that is text", "generate", entries(CONFIG, eos_token_id="</s>"), "config.json | eos_token_id is '</s>'"),
    ("rope_theta of text", "train", entries(CONFIG, rope_theta="big"), "config.json | rope_theta is 'big'"),
    ("rope_theta of 0", "plan", entries(CONFIG, rope_theta=0), "config.json | rope_theta is 0"),
    ("RoPE as a list", "plan", entries(CONFIG, rope_scaling=[1]), "config.json | rope parameters"),
    ("another RoPE", "info", entries(CONFIG, rope_scaling={"type": "ntk"}), "config.json | rope type 'ntk'"),
    (
        "factors of text",
        "plan",
        entries(CONFIG, rope_scaling={"type": "su", "short_factor": "1111", "long_factor": [1] * 4}),
        "config.json | short_factor is '1111'",
    ),
    (
        "factors of 0",
        "plan",
        entries(CONFIG, rope_scaling={"type": "su", "short_factor": [0] * 4, "long_factor": [1] * 4}),
        "config.json | short_factor",
    ),
    (
        "another quantisation",
        "evaluate",
        entries(CONFIG, quantization_config={"quant_method": "gptq"}),
        "config.json | 'gptq'",
    ),
    (
        "a quantisation of lists",
        "info",
        entries(CONFIG, quantization_config={"load_in_4bit": True, "bnb_4bit_quant_type": []}),
        "config.json | bnb_4bit_quant_type",
    ),
    ("dropout in the base", "train", entries(CONFIG, attention_dropout=0.5), "attention_dropout is 0.5"),
    ("control characters", "plan", entries(CONFIG, model_type="\x1b[31m\u202e"), r"config.json | \x1b[31m | \u202e"),
]
GENERATIONS = [
    ("a list for settings", "generate", text(GENERATION, "[]"), "generation_config.json | holds a list"),
    ("ends that are texts", "chat", entries(GENERATION, eos_token_id=["a"]), "generation_config.json | eos_token_id"),
    (
        "a temperature of text",
        "generate",
        entries(GENERATION, temperature="hot"),
        "generation_config.json | temperature is 'hot'",
    ),
    ("no such feature", "generate", entries(GENERATION, guidance_scale=3.0), "generation_config.json | guidance_scale"),
    ("10^9 beams", "generate", entries(GENERATION, num_beams=10**9), "1,000,000,000 answers | GiB | num_beams"),
    (
        "10^12 answers",
        "generate",
        entries(GENERATION, num_return_sequences=10**12, do_sample=True),
        "1,000,000,000,000 answers | num_return_sequences",
    ),
    (
        "10^9 tokens",
        "generate",
        both(entries(GENERATION, max_new_tokens=10**9), entries(CONFIG, max_position_embeddings=2**31 - 1)),
        "GiB | max_new_tokens",
    ),
    ("a link out of the folder", "export", linked(GENERATION, "/etc/passwd"), "generation_config.json | /etc/passwd"),
]
FILES = [
    ("no weights", "train", gone(WEIGHTS), "base | no weights"),
    ("an empty file", "evaluate", text(WEIGHTS, ""), "model.safetensors"),
    ("half a file", "generate", cut(WEIGHTS, 2000), "model.safetensors"),
    ("a pointer of git's", "chat", text(WEIGHTS, "version https://git-lfs.github.com/spec/v1\n"), "model.safetensors"),
    ("a header of 2^63 bytes", "info", header(WEIGHTS, lambda h: h, length=2**63), "model.safetensors"),
    ("a header that is no JSON", "train", header(WEIGHTS, lambda h: b"{]"), "model.safetensors | header is broken"),
    ("a header that is a list", "info", header(WEIGHTS, lambda h: [1]), "model.safetensors | header is broken"),
    ("a nested header", "info", header(WEIGHTS, lambda h: DEEP.encode()), "model.safetensors | nested too deep"),
    ("an unknown dtype", "export", header(WEIGHTS, first({"dtype": "F17"})), "model.safetensors | 'F17'"),
    ("a shape of texts", "info", header(WEIGHTS, first({"shape": ["a"]})), "model.safetensors | no proper shape"),
    ("a shape of 2^128", "info", header(WEIGHTS, first({"shape": [2**62, 2**62]})), "model.safetensors | 2^63"),
    ("a negative shape", "info", header(WEIGHTS, first({"shape": [-1]})), "model.safetensors | no proper shape"),
    (
        "overlapping tensors",
        "info",
        header(WEIGHTS, first({"shape": [1], "data_offsets": [0, 4]})),
        "model.safetensors",
    ),
    ("offsets backwards", "info", header(WEIGHTS, first({"data_offsets": [8, 4]})), "model.safetensors | -4 bytes"),
    (
        "a tensor twice",
        "info",
        header(WEIGHTS, lambda h: b'{"a": 1, "a": 1}'),
        "model.safetensors | 'a' stands twice",
    ),
    (
        "metadata of numbers",
        "info",
        header(WEIGHTS, lambda h: h.update({"__metadata__": {"a": 1}})),
        "model.safetensors | __metadata__",
    ),
    (
        "another shape",
        "benchmark",
        tensors(WEIGHTS, lambda t: t.update({"lm_head.weight": np.zeros((3, 3), "f4")})),
        "lm_head.weight is [3, 3]",
    ),
    (
        "whole numbers",
        "train",
        tensors(WEIGHTS, lambda t: t.update({"lm_head.weight": t["lm_head.weight"].astype("i4")})),
        "lm_head.weight is I32",
    ),
    (
        "a tensor of a hostile name",
        "info",
        tensors(WEIGHTS, lambda t: t.update({"\x1b]0;x\x07\u202e": np.zeros(1, "f4")})),
        r"unknown tensors | \x1b",
    ),
    ("a missing tensor", "evaluate", tensors(WEIGHTS, lambda t: t.pop("model.norm.weight")), "model.norm.weight"),
    ("weights in another folder", "train", moved_out(WEIGHTS), "model.safetensors | elsewhere | out of its folder"),
    (
        "a pickle",
        "train",
        both(gone(WEIGHTS), text("pytorch_model.bin", b"cos\n_exit\n(I99\ntR.")),
        "pytorch_model.bin",
    ),
    ("an index that leads up", "train", index("../elsewhere.safetensors"), "../elsewhere.safetensors"),
    ("an index to the root", "info", index("/etc/passwd"), "/etc/passwd"),
    ("an index to a pickle", "evaluate", index("pytorch_model.bin"), "pytorch_model.bin | no safetensors file"),
    ("an index to an endless name", "info", index("a" * 5000 + ".safetensors"), "no safetensors file"),
    ("an index of no file", "generate", index("model-2.safetensors"), "missing shards (model-2.safetensors)"),
    ("an index of numbers", "info", index({"a": 1}), "model.safetensors.index.json | weight_map"),
    ("an index without a map", "info", both(index("x"), text("model.safetensors.index.json", "{}")), "weight_map"),
]
TOKENIZERS = [
    ("no tokenizer", "train", both(gone(TOKENIZER), gone(TOKENIZER_CONFIG)), "base | no tokenizer.json"),
    ("an empty tokenizer.json", "evaluate", text(TOKENIZER, ""), "tokenizer cannot be read"),
    ("a tokenizer of no kind", "generate", text(TOKENIZER, '{"model": {"type": "X"}}'), "tokenizer cannot be read"),
    ("a tokenizer nested without end", "chat", text(TOKENIZER, DEEP), "tokenizer cannot be read"),
    ("a tokenizer that panics", "chat", entries(TOKENIZER, model=PANICS), "tokenizer cannot be read"),
    ("a token of 2^31", "train", entries(TOKENIZER, model=FAR), "tokenizer.json | has token 2147483648"),
    ("replacements that double", "generate", entries(TOKENIZER, normalizer=DOUBLINGS), "more than 100 times as long"),
    ("a decoder that doubles", "chat", entries(TOKENIZER, decoder=DECODERS), "more than 100 times as long"),
    ("a tokenizer's link", "export", linked(TOKENIZER, "/etc/passwd"), "tokenizer.json | /etc/passwd"),
    ("a template's link", "export", linked("chat_template.jinja", "/etc/passwd"), "chat_template.jinja | /etc/passwd"),
    ("settings that are a list", "train", text(TOKENIZER_CONFIG, "[]"), "tokenizer_config.json | holds a list"),
    ("added tokens nested", "train", text("added_tokens.json", DEEP), "added_tokens.json | nested too deep"),
    ("special tokens as a list", "train", text("special_tokens_map.json", "[]"), "special_tokens_map.json | a list"),
    ("a template of bytes", "info", text("chat_template.jinja", b"\xff\xfe"), "chat_template.jinja | is not UTF-8"),
    ("a template that is broken", "train", text("chat_template.jinja", "{% for %}"), "chats.jsonl, row 1 | template"),
    ("a template of 10^10 rounds", "generate", text("chat_template.jinja", BOMB), "template | takes longer than 1 s"),
    ("a template that doubles", "train", text("chat_template.jinja", DOUBLING), "template"),
    ("no template", "chat", gone("chat_template.jinja"), "no chat template"),
]


@pytest.mark.parametrize(("command", "damage", "words"), [case[1:] for case in CONFIGS], ids=[c[0] for c in CONFIGS])
def test_config(command, damage, words, world, capfd):
    damage(world.base)
    assert words_missing(refusal(world.argv(command), capfd, world.root), words) == []


@pytest.mark.parametrize(
    ("command", "damage", "words"), [case[1:] for case in GENERATIONS], ids=[c[0] for c in GENERATIONS]
)
def test_generation_config(command, damage, words, world, capfd):
    damage(world.base)
    assert words_missing(refusal(world.argv(command), capfd, world.root), words) == []


@pytest.mark.parametrize(("command", "damage", "words"), [case[1:] for case in FILES], ids=[c[0] for c in FILES])
def test_weights(command, damage, words, world, capfd):
    damage(world.base)
    assert words_missing(refusal(world.argv(command), capfd, world.root), words) == []


@pytest.mark.parametrize(
    ("command", "damage", "words"), [case[1:] for case in TOKENIZERS], ids=[c[0] for c in TOKENIZERS]
)
def test_tokenizer(command, damage, words, world, capfd, monkeypatch):
    monkeypatch.setattr("phi3_jax.data.template.SECONDS", 1.0)
    damage(world.base)
    assert words_missing(refusal(world.argv(command), capfd, world.root), words) == []
