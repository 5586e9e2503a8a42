"""A tiny model and batches for the tests of training."""

import json
import random
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from phi3_jax import LoraConfig, Phi3Config, Phi3ForCausalLM
from phi3_jax.config.run import RunConfig
from phi3_jax.config.sections import TrainingSection
from phi3_jax.lora import Lora, init_lora, partition, trainable_mask
from phi3_jax.optim.optimizer import make_optimizer, make_schedule
from phi3_jax.training.step import Params, TrainState, TrainStep, make_train_step

VOCAB = 53


def tiny_model(layers: int = 2, dtype: Any = jnp.float32, **overrides: Any) -> Phi3ForCausalLM:
    config = Phi3Config(
        **{
            "vocab_size": VOCAB,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": layers,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "pad_token_id": 0,
            # Ten times the usual spread, so that attention is not uniform.
            "initializer_range": 0.2,
            **overrides,
        }
    )
    return Phi3ForCausalLM(config, dtype=dtype, rngs=nnx.Rngs(0))


def random_lora(model: Phi3ForCausalLM, **config: Any) -> Lora:
    """Adapters that change something from the start: A and B are both random."""
    lora_config = LoraConfig(**{"r": 4, "init_lora_weights": False, **config})
    return init_lora(model, lora_config, jax.random.key(7))


def random_rows(lengths: list[int], width: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Right-padded rows of random tokens `[rows, width]`; a random half of the tokens are targets."""
    rng = np.random.default_rng(seed)
    shape = len(lengths), width
    real = np.arange(width) < np.array(lengths)[:, None]
    ids = np.where(real, rng.integers(1, VOCAB, shape), 0).astype(np.int32)
    mask = real & (rng.random(shape) < 0.5)
    mask[:, 0] = False
    return {
        "input_ids": ids,
        "positions": np.where(real, np.arange(width), 0).astype(np.int32),
        "segment_ids": real.astype(np.int32),
        "loss_mask": mask.astype(np.int32),
    }


def accumulated(rows: dict[str, np.ndarray], accumulation: int) -> dict[str, jax.Array]:
    """`[rows, width]` -> `[accumulation, rows / accumulation, width]`, on the device."""
    return {name: jnp.asarray(x.reshape(accumulation, -1, x.shape[-1])) for name, x in rows.items()}


def start(
    model: Phi3ForCausalLM, lora: Lora | None, training: TrainingSection, total_steps: int = 10, dtype: Any = None
) -> tuple[TrainState, Params, TrainStep]:
    """A training state, the frozen parameters and the step, for an adapter or, without, the model."""
    graph, weights = nnx.split(model)
    mask = trainable_mask(weights, lora, full_finetuning=lora is None)
    # Copies, since the step takes the trainable arrays with it.
    params = jax.tree.map(jnp.copy, {"model": weights, "lora": lora})
    trainable, frozen = partition(params, mask)
    tx = make_optimizer(training, make_schedule(training, total_steps))
    state = TrainState.create(trainable, tx, jax.random.key(training.seed))
    return state, frozen, TrainStep(make_train_step(graph, dtype or model.dtype, tx, training))


TEMPLATE = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% else %}{{ eos_token }}{% endif %}"
)
LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789 "


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A token for every letter, and Phi-3's special tokens."""
    specials = ["<pad>", "<s>", "<|endoftext|>", "<unk>", "<|user|>", "<|assistant|>", "<|end|>"]
    vocabulary = {token: i for i, token in enumerate([*specials, *LETTERS])}
    assert len(vocabulary) <= VOCAB
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    backend.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="<|endoftext|>",
        unk_token="<unk>",
        additional_special_tokens=specials[4:],
    )
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def write_checkpoint(folder: Path, layers: int = 1) -> Path:
    tiny_model(layers, bos_token_id=1, eos_token_id=2).save_pretrained(str(folder))
    tiny_tokenizer().save_pretrained(folder)
    return folder


def write_chats(path: Path, number: int = 13, seed: int = 0) -> Path:
    """Questions whose answers repeat their last word, in rows of different lengths."""
    rng = random.Random(seed)
    with path.open("w") as file:
        for _ in range(number):
            words = ["".join(rng.choices("abc", k=rng.randint(1, 3))) for _ in range(rng.randint(1, 5))]
            row = {
                "messages": [{"role": "user", "content": " ".join(words)}, {"role": "assistant", "content": words[-1]}]
            }
            file.write(json.dumps(row) + "\n")
    return path


def run_config(folder: Path, output: str = "out", **sections: dict[str, Any]) -> RunConfig:
    """A short run on `folder/base` and `folder/chats.jsonl`; each section may be overridden by name."""
    training = {
        "output_dir": str(folder / output),
        "learning_rate": 1e-2,
        "max_steps": 6,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "logging_steps": 2,
        "eval_steps": 3,
        "save_steps": 2,
        "eval_generations": 2,
        "eval_max_new_tokens": 4,
        "gradient_checkpointing": False,
    }
    return RunConfig.from_dict(
        {
            "model": {"name_or_path": str(folder / "base"), "dtype": "float32", **sections.get("model", {})},
            "peft": {"r": 2, "lora_dropout": 0.1, **sections.get("peft", {})},
            "data": {
                "train": str(folder / "chats.jsonl"),
                "eval": str(folder / "eval.jsonl"),
                "max_length": 32,
                **sections.get("data", {}),
            },
            "training": {**training, **sections.get("training", {})},
            "logging": {"progress": False, "tensorboard": False, **sections.get("logging", {})},
        }
    )


def write_inputs(folder: Path) -> Path:
    """What `run_config` reads."""
    write_checkpoint(folder / "base")
    write_chats(folder / "chats.jsonl")
    write_chats(folder / "eval.jsonl", number=5, seed=1)
    return folder


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
