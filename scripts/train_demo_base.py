"""Makes the demo's base model anew, from nothing, with the project's own full fine-tuning.

    python scripts/train_demo_base.py             # into phi3_jax/demo/base; about ten minutes on two cores

Writes the corpora and a tokenizer trained on them, starts a random model, trains it by
scripts/demo_sets/base.yaml, first to copy and then to answer, and stores the result in float16.
"""

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from demo_sets.chats import base_corpus, copy_corpus
from demo_sets.orders import write_rows
from flax import nnx
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from phi3_jax import Phi3Config, Phi3ForCausalLM
from phi3_jax.config.model import RopeConfig
from phi3_jax.config.parse import merged, read_yaml
from phi3_jax.config.run import parse_run_config
from phi3_jax.demo import demo_path
from phi3_jax.training.loop import train

Row = dict[str, Any]
ROOT = Path(__file__).parents[1]
VOCAB_SIZE = 1024
MAX_LENGTH = 512
SPECIAL_TOKENS = ("<unk>", "<s>", "</s>", "<|endoftext|>", "<|assistant|>", "<|system|>", "<|end|>", "<|user|>")
MODEL_CARD = """\
---
license: apache-2.0
language: en
pipeline_tag: text-generation
---
# phi3_jax demo base

A chat model of {parameters:,} parameters in Phi-3's architecture, the base of `phi3-jax demo`. It answers
questions about order messages, copies words and makes a little small talk; it knows nothing else.

Trained from a random start on generated chats (`scripts/demo_sets/chats.py`) by full fine-tuning with phi3_jax:
`python scripts/train_demo_base.py` makes it again.
"""
# Phi-3's since July 2024.
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'system' %}{{'<|system|>\n' + message['content'] + "
    "'<|end|>\n'}}{% elif message['role'] == 'user' %}{{'<|user|>\n' + message['content'] + '<|end|>\n'}}"
    "{% elif message['role'] == 'assistant' %}{{'<|assistant|>\n' + message['content'] + '<|end|>\n'}}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE of `VOCAB_SIZE` tokens with Phi-3's special tokens and chat template."""
    bpe = Tokenizer(models.BPE())
    # A digit a token: numbers are copied, not learned by heart.
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE - len(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    # As in Phi-3, the newline after a role or an end is part of that token.
    bpe.add_special_tokens(
        [
            AddedToken(
                token, rstrip=token.startswith("<|") and token != "<|endoftext|>", special=True, normalized=False
            )
            for token in SPECIAL_TOKENS
        ]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        chat_template=CHAT_TEMPLATE,
        model_max_length=MAX_LENGTH,
        clean_up_tokenization_spaces=False,
        padding_side="left",
    )


def start_checkpoint(folder: Path, tokenizer: PreTrainedTokenizerFast, seed: int) -> None:
    """A random model: Phi-3's architecture with grouped heads and tied embeddings, 574,336 parameters."""
    config = Phi3Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=MAX_LENGTH,
        initializer_range=0.06,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        # A small theta: in so short a context it is neighbours that matter, and copying is learnt sooner.
        rope=RopeConfig(theta=100.0, original_max_position_embeddings=MAX_LENGTH),
    )
    Phi3ForCausalLM(config, rngs=nnx.Rngs(seed)).save_pretrained(str(folder))
    tokenizer.save_pretrained(folder)


def train_stage(folder: Path, start: Path, rows: list[Row], held_out: list[Row], seed: int) -> Path:
    """Trains the checkpoint `start` on rows by scripts/demo_sets/base.yaml; returns where the result is."""
    folder.mkdir(parents=True, exist_ok=True)
    write_rows(folder / "train.jsonl", rows)
    write_rows(folder / "eval.jsonl", held_out)
    stage = {
        "model": {"name_or_path": str(start)},
        "data": {"train": str(folder / "train.jsonl"), "eval": str(folder / "eval.jsonl")},
        "training": {"output_dir": str(folder / "run"), "seed": seed},
    }
    train(parse_run_config(merged(read_yaml(ROOT / "scripts" / "demo_sets" / "base.yaml"), stage))[0])
    return folder / "run" / "model"


def store(trained: Path, target: Path) -> None:
    """The trained weights in float16, with the tokenizer, as a folder that transformers loads too."""
    model = Phi3ForCausalLM.from_pretrained(str(trained), dtype=jnp.float16)
    shutil.rmtree(target, ignore_errors=True)
    model.save_pretrained(str(target))
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(trained / name, target)
    ends = [model.config.eos_token_id, PreTrainedTokenizerFast.from_pretrained(target).convert_tokens_to_ids("<|end|>")]
    parameters = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model)))
    (target / "README.md").write_text(MODEL_CARD.format(parameters=parameters), encoding="utf-8")
    # transformers 5 writes the name of a class that 4 does not have, and how the file was loaded.
    path = target / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8")) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    settings = {key: value for key, value in settings.items() if key not in ("is_local", "local_files_only")}
    path.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    generation = {"eos_token_id": ends, "pad_token_id": model.config.pad_token_id}
    (target / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=ROOT / "out" / "demo_base", help="corpora, start and runs go here")
    parser.add_argument("--target", type=Path, default=demo_path("base"), help="where the finished model goes")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()

    work, seed = arguments.work, arguments.seed
    copying, answering = copy_corpus(seed), base_corpus(seed)
    tokenizer = train_tokenizer([turn["content"] for row in answering[:4000] for turn in row["messages"]])
    start_checkpoint(work / "start", tokenizer, seed)
    # Copying first: learned beside the questions it comes several times later.
    copies = train_stage(work / "1_copy", work / "start", copying, copy_corpus(seed + 1, 300), seed)
    answers = train_stage(work / "2_answer", copies, answering, base_corpus(seed + 1, 300), seed)
    store(answers, arguments.target)
    print(f"{arguments.target}: {sum(f.stat().st_size for f in arguments.target.iterdir()) / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
