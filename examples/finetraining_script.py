"""The Phi-3 cookbook's training script (`FineTrainingScript.py`), carried over to JAX.

    pip install "phi3_jax[cuda13]"
    MODEL=microsoft/Phi-3-mini-4k-instruct DATASET=owner/name python finetraining_script.py

It wants conversations as ShareGPT has them, in a column `conversations`: {"from": "human", "value": …}. As the original
it trains all weights of the model, which for Phi-3-mini takes 58 GiB of a device's memory by `phi3-jax plan`: on a GPU
of 80 GB set XLA_PYTHON_CLIENT_MEM_FRACTION=0.95, since JAX takes three quarters of it otherwise. With a dictionary such
as {"r": 16, "target_modules": "all-linear"} in place of `None` it trains an adapter, in 8 GiB. README.md beside this
file holds the cookbook's lines against these.
"""

import os

from datasets import load_dataset

import phi3_jax as p3

MODEL_NAME = os.environ.get("MODEL", "microsoft/Phi-3-mini-4k-instruct")
DATASET_NAME = os.environ["DATASET"]
NEW_MODEL_NAME = os.environ.get("NEW_MODEL", "New-Model-phi-3-mini-4k")

# The tokenizer; the model is loaded by the run, in the type of `bf16`.
tokenizer = p3.load_tokenizer(MODEL_NAME)

# The rows to train on
dataset = load_dataset(DATASET_NAME, split="train")


def formatting_prompts_func(examples):
    """The text of each conversation, written out as the cookbook does."""
    mapper = {"system": "system\n", "human": "\nuser\n", "gpt": "\nassistant\n"}
    texts = []
    for conversation in examples["conversations"]:
        text = "".join(f"{mapper[turn['from']]} {turn['value']}\n" for turn in conversation)
        texts.append(f"{text}{tokenizer.eos_token}")
    return {"text": texts}


dataset = dataset.map(formatting_prompts_func, batched=True, remove_columns=dataset.column_names)

# How to train
args = {
    "per_device_train_batch_size": 7,
    "gradient_accumulation_steps": 4,
    "gradient_checkpointing": True,
    "learning_rate": 1e-4,
    "bf16": True,
    "max_steps": -1,
    "num_train_epochs": 3,
    "save_strategy": "epoch",
    "logging_steps": 10,
    "output_dir": NEW_MODEL_NAME,
    "optim": "paged_adamw_32bit",
    "lr_scheduler_type": "linear",
}

# What the cookbook gives to SFTTrainer
run = p3.RunConfig.from_trl(
    {**args, "dataset_text_field": "text", "max_seq_length": 128},
    None,
    model=MODEL_NAME,
    data={},
)

# The training itself
p3.train(run, train_dataset=dataset)
