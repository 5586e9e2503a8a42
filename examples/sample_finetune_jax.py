"""Phi-3's own sample of fine-tuning (`sample_finetune.py` beside the model's weights on the hub), carried over to JAX.

    pip install "phi3_jax[cuda13]"
    python sample_finetune_jax.py

The order, the names and the numbers are the sample's; README.md beside this file holds its lines against these. MODEL
and DATASET in the environment take the place of the two hub ids: other ones, or local folders.
"""

import logging
import os
import sys

from datasets import load_dataset

import phi3_jax as p3

logger = logging.getLogger(__name__)

# --- Hyper-parameters

training_config = {
    "bf16": True,
    "do_eval": False,
    "learning_rate": 5.0e-06,
    "log_level": "info",
    "logging_steps": 20,
    "logging_strategy": "steps",
    "lr_scheduler_type": "cosine",
    "num_train_epochs": 1,
    "max_steps": -1,
    "output_dir": "./checkpoint_dir",
    "overwrite_output_dir": True,
    "per_device_eval_batch_size": 4,
    "per_device_train_batch_size": 4,
    "remove_unused_columns": True,
    "save_steps": 100,
    "save_total_limit": 1,
    "seed": 0,
    "gradient_checkpointing": True,
    "gradient_checkpointing_kwargs": {"use_reentrant": False},
    "gradient_accumulation_steps": 1,
    "warmup_ratio": 0.2,
}
peft_config = {
    "r": 16,
    "lora_alpha": 32,
    "lora_dropout": 0.05,
    "bias": "none",
    "task_type": "CAUSAL_LM",
    "target_modules": "all-linear",
    "modules_to_save": None,
}

# --- Logging

logging.basicConfig(
    format="%(asctime)s - %(levelname)s - %(name)s - %(message)s",
    datefmt="%Y-%m-%d %H:%M:%S",
    level=logging.INFO,
    handlers=[logging.StreamHandler(sys.stdout)],
)
logger.info("training: %s", training_config)
logger.info("adapter: %s", peft_config)

# --- Model and tokenizer

checkpoint_path = os.environ.get("MODEL", "microsoft/Phi-3-mini-4k-instruct")
model_kwargs = {
    "use_cache": False,
    "trust_remote_code": True,
    "attn_implementation": "flash_attention_2",
    "torch_dtype": "bfloat16",
    "device_map": None,
}
tokenizer = p3.load_tokenizer(checkpoint_path)

# --- Data


def apply_chat_template(example):
    """A conversation as one text, every token of which is trained on."""
    return {"text": tokenizer.apply_chat_template(example["messages"], tokenize=False, add_generation_prompt=False)}


raw_dataset = load_dataset(os.environ.get("DATASET", "HuggingFaceH4/ultrachat_200k"))
train_dataset = raw_dataset["train_sft"]
test_dataset = raw_dataset["test_sft"]
column_names = list(train_dataset.features)

processed_train_dataset = train_dataset.map(
    apply_chat_template, remove_columns=column_names, desc="Applying chat template to train_sft"
)
processed_test_dataset = test_dataset.map(
    apply_chat_template, remove_columns=column_names, desc="Applying chat template to test_sft"
)

# --- Training

run = p3.RunConfig.from_dicts(
    model={"name_or_path": checkpoint_path, **model_kwargs},
    training_config={**training_config, "max_seq_length": 2048, "dataset_text_field": "text", "packing": True},
    peft_config=peft_config,
    data={},
)
# The sample calls trainer.evaluate() once, after the last step; here a run does that itself where it may evaluate.
run = run.changed({"training.eval_strategy": "steps"})
# Trains, evaluates, and writes under output_dir: adapter/, checkpoints/, train_results.json, eval_results.json,
# all_results.json, metrics.jsonl and report.html.
metrics = p3.train(run, train_dataset=processed_train_dataset, eval_dataset=processed_test_dataset)
metrics = {**metrics, "eval_samples": len(processed_test_dataset)}
logger.info("metrics: %s", metrics)
