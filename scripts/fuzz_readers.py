"""What `fuzz.py` damages and reads: for each reader valid files, and what the commands do with them."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

CONFIG = {
    "model_type": "phi3",
    "vocab_size": 48,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "head_dim": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "original_max_position_embeddings": 16,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "rope_scaling": {"type": "longrope", "short_factor": [1.0, 1.5, 2.0, 2.5], "long_factor": [2.0, 4.0, 6.0, 8.0]},
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "hidden_act": "silu",
    "sliding_window": 32,
    "auto_map": {"AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM"},
}
QUANTIZED = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
ADAPTER = {
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "r": 2,
    "lora_alpha": 4,
    "lora_dropout": 0.1,
    "bias": "none",
    "target_modules": ["o_proj", "qkv_proj"],
    "rank_pattern": {"o_proj": 3},
    "alpha_pattern": {},
    "init_lora_weights": True,
    "base_model_name_or_path": "some/base",
    "layers_to_transform": None,
}
CHAT = [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "It is <|end|> 4."}]
ROWS = [
    *({"messages": CHAT, "system": "Be brief."}, {"conversations": [{"from": "human", "value": "a"}], "weight": 1}),
    *({"prompt": "a", "completion": 7}, {"instruction": "a", "input": "", "output": "b"}, {"text": "a"}),
]
RUN = {
    "model": {"name_or_path": "some/base", "dtype": "bfloat16"},
    "peft": {"r": 8, "lora_alpha": 16, "target_modules": ["qkv_proj"], "rank_pattern": {"qkv_proj": 4}},
    "data": {"train": "chats.jsonl", "max_length": 64, "columns": {"prompt": "q"}, "packing": True},
    "training": {"learning_rate": 1e-4, "max_steps": 3, "bf16": True, "report_to": ["none"], "output_dir": "out"},
    "parallel": {"data": 1},
    "logging": {"tensorboard": False},
}


def as_json(value: Any) -> bytes:
    """JSON as Python writes it: surrogates are escaped, NaN and Infinity are not refused."""
    return json.dumps(value).encode()


def _write_config(folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_bytes(as_json({**CONFIG, "quantization_config": QUANTIZED}))
    (folder / "generation_config.json").write_bytes(as_json({"eos_token_id": [2, 3], "temperature": 0.7, "top_k": 5}))


def _read_config(folder: Path) -> None:
    from phi3_jax.config.generation import GenerationConfig
    from phi3_jax.config.model import Phi3Config
    from phi3_jax.hf.bnb import read_bnb_config

    config = Phi3Config.from_pretrained(folder)
    assert Phi3Config.from_dict(config.to_dict()).rope == config.rope
    GenerationConfig.from_model(config)
    read_bnb_config(config, folder / "config.json")


def _write_checkpoint(folder: Path) -> None:
    from safetensors.numpy import save_file

    from phi3_jax.config.model import Phi3Config
    from phi3_jax.hf.layout import checkpoint_layout

    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_bytes(as_json(CONFIG))
    tensors = {
        entry.name: np.ones(entry.shape, np.float16) for entry in checkpoint_layout(Phi3Config.from_dict(CONFIG))
    }
    names = sorted(tensors)
    files = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, part in files.items():
        save_file({name: tensors[name] for name in part}, folder / file)
    weight_map = {name: file for file, part in files.items() for name in part}
    (folder / "model.safetensors.index.json").write_bytes(as_json({"metadata": {}, "weight_map": weight_map}))


def _read_checkpoint(folder: Path) -> None:
    from phi3_jax.hf.checkpoint import Checkpoint

    assert Checkpoint.open(folder).weights.tensors


def _write_header(folder: Path) -> None:
    from safetensors.numpy import save_file

    folder.mkdir(exist_ok=True)
    arrays = {name: np.arange(12, dtype=dtype).reshape(3, 4) for name, dtype in (("a", "f4"), ("b", "f2"), ("c", "u1"))}
    save_file({**arrays, "empty": np.zeros((0, 3), "f4"), "scalar": np.array(1, "f4")}, folder / "model.safetensors")


def _read_header(folder: Path) -> None:
    from phi3_jax.hf.safetensors_io import READABLE, read_header, read_metadata, read_tensor

    read_metadata(folder / "model.safetensors")
    for entry in read_header(folder / "model.safetensors").values():
        if entry.dtype in READABLE:
            read_tensor(entry, np.empty(entry.shape, READABLE[entry.dtype]))


def _write_adapter(folder: Path) -> None:
    from safetensors.numpy import save_file

    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_bytes(as_json(ADAPTER))
    shapes = {"o_proj": (3, 32, 32), "qkv_proj": (2, 64, 32)}
    tensors: dict[str, np.ndarray] = {}
    for layer in range(2):
        for module, (r, rows, columns) in shapes.items():
            name = f"base_model.model.model.layers.{layer}.self_attn.{module}.lora_"
            tensors |= {f"{name}A.weight": np.ones((r, columns), "f4"), f"{name}B.weight": np.ones((rows, r), "f4")}
    record = {"r": 2, "lora_alpha": 4, "slices": {}}
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt", "phi3_jax": json.dumps(record)})


def _read_adapter(folder: Path) -> None:
    from phi3_jax.config.model import Phi3Config
    from phi3_jax.model.leaves import abstract_model
    from phi3_jax.peft.adapter import load_adapter

    if "model" not in _KEPT:
        _KEPT["model"] = abstract_model(Phi3Config.from_dict(CONFIG))
    load_adapter(folder, _KEPT["model"])


_KEPT: dict[str, Any] = {}  # what is made once


def _write_rows(name: str) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        import datasets

        folder.mkdir(exist_ok=True)
        file = folder / name
        if file.suffix == ".json":
            file.write_bytes(as_json(ROWS))
        elif file.suffix == ".jsonl":
            file.write_bytes(b"\n".join(map(as_json, ROWS)))
        elif file.suffix == ".csv":
            file.write_text('prompt,completion\na,"b, ""c"""\n"d\ne",7\n', encoding="utf-8")
        elif file.suffix == ".parquet":
            datasets.Dataset.from_list(ROWS[:1] * 3).to_parquet(str(file))
        else:
            datasets.Dataset.from_list(ROWS[:1] * 3).save_to_disk(str(folder))

    return write


def _read_rows(name: str) -> Callable[[Path], None]:
    def read(folder: Path) -> None:
        from phi3_jax.data.formats import read_row
        from phi3_jax.data.sources import load_sources

        for source in load_sources(str(folder / name), split="train"):
            for index in range(len(source.rows)):
                read_row(source.rows[index], source.where(index))

    return read


def _write_run(folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "run.yaml").write_text(yaml.safe_dump(RUN), encoding="utf-8")


def _read_run(folder: Path) -> None:
    from phi3_jax.config.parse import read_yaml
    from phi3_jax.config.run import parse_run_config

    parse_run_config(read_yaml(folder / "run.yaml"))


def _write_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    specials = ["<s>", "<|endoftext|>", "<|user|>", "<|assistant|>", "<|end|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({word: index for index, word in enumerate([*alphabet, "th"])}, [("t", "h")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=specials[0], eos_token=specials[1], additional_special_tokens=specials[2:]
    )
    tokenizer.save_pretrained(folder)
    template = "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content + '<|end|>' }}{% endfor %}{{ eos_token }}"
    config = json.loads((folder / "tokenizer_config.json").read_bytes())
    (folder / "tokenizer_config.json").write_bytes(as_json({**config, "chat_template": template}))


def _read_tokenizer(folder: Path) -> None:
    from phi3_jax.data.chat import ChatTokenizer
    from phi3_jax.data.formats import Conversation, Turn
    from phi3_jax.hf.tokenizer import load_tokenizer

    chat = ChatTokenizer(load_tokenizer(folder))
    turns = tuple(Turn(turn["role"], turn["content"]) for turn in CHAT)
    chat.encode([chat.render(Conversation(turns, is_prompt_completion=True), "row 1")])


@dataclass(frozen=True)
class Reader:
    """Attributes:
    write: Valid files in a folder.
    read: What is tried on them, damaged.
    """

    write: Callable[[Path], None]
    read: Callable[[Path], None]


READERS = {
    "header": Reader(_write_header, _read_header),
    "config": Reader(_write_config, _read_config),
    "checkpoint": Reader(_write_checkpoint, _read_checkpoint),
    "adapter": Reader(_write_adapter, _read_adapter),
    "run": Reader(_write_run, _read_run),
    "tokenizer": Reader(_write_tokenizer, _read_tokenizer),
    **{
        kind: Reader(_write_rows(f"rows.{kind}"), _read_rows(f"rows.{kind}"))
        for kind in ("jsonl", "json", "csv", "parquet")
    },
    "disk": Reader(_write_rows(""), _read_rows("")),
}
