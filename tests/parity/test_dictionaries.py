"""A script's dictionaries in `RunConfig.from_dicts` beside the same dictionaries in TRL's SFTTrainer, step by step.

On the same rows in their order, in float32 on a CPU: how many steps, the learning rate of each, on how many tokens it
is trained, and its loss.
"""

import json
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
trl = pytest.importorskip("trl")
transformers = pytest.importorskip("transformers")

import datasets  # noqa: E402

from phi3_jax.config.run import RunConfig  # noqa: E402
from tests.helpers import trl_rows as rows  # noqa: E402
from tests.helpers.references import torch_phi3  # noqa: E402
from tests.helpers.samples import sample_dictionary  # noqa: E402
from tests.helpers.tokenizers import PHI_3_5, phi3_tokenizer  # noqa: E402
from tests.helpers.tool_templates import MARKED  # noqa: E402
from tests.helpers.trl_runs import our_steps, steps_of_trl  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")

LORA = {"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}


@dataclass(frozen=True)
class Script:
    """What a script gives to SFTTrainer.

    Attributes:
        training: Of SFTConfig, or of TrainingArguments where it has no name of SFTConfig's.
        peft: Of LoraConfig; None trains all weights.
        row: Makes a row.
        number: Of rows.
        theirs: Where TRL of today needs another word for the same.
        template: The tokenizer's.
        steps: How many there are at least.
    """

    training: dict[str, Any]
    peft: dict[str, Any] | None = None
    row: Any = rows.text
    number: int = 16
    theirs: Any = None
    template: str = PHI_3_5
    steps: int = 6


def scheduled(name: str, **settings: Any) -> Script:
    training = {"lr_scheduler_type": name, "per_device_train_batch_size": 2, "max_steps": 8, **settings}
    return Script(training, LORA, steps=8)


# The samples' own, with shorter rows, and without dropout, which no two libraries draw alike.
NOTEBOOK, SCRIPT, CARD = "phi3_inference_finetuning.ipynb", "finetraining_script.py", "sample_finetune_jax.py"
LORA_NOTEBOOK, QLORA_NOTEBOOK = "phi3_finetune_lora.ipynb", "phi3_finetune_qlora.ipynb"


def training_of(name: str, variable: str = "args", **beside: Any) -> dict[str, Any]:
    """What a sample gives to TrainingArguments, and beside it to SFTTrainer."""
    return {**sample_dictionary(name, variable), "dataset_text_field": "text", **beside}


def adapter_of(name: str, **changes: Any) -> dict[str, Any]:
    return {**sample_dictionary(name, "peft_config"), "lora_dropout": 0.0, **changes}


# PEFT finds these two of the seven names that the notebooks give, which are Llama's.
FOUND = {"target_modules": ["o_proj", "down_proj"]}
SCRIPTS = {
    "cookbook: inference and fine-tuning": Script(training_of(NOTEBOOK, max_seq_length=128), None, rows.plain_text, 40),
    "cookbook: training script": Script(training_of(SCRIPT, max_seq_length=128), None, rows.plain_text, 40),
    "cookbook: LoRA": Script(
        training_of(LORA_NOTEBOOK, max_seq_length=512), adapter_of(LORA_NOTEBOOK, **FOUND), number=64
    ),
    "cookbook: QLoRA": Script(
        training_of(QLORA_NOTEBOOK, max_seq_length=512),
        adapter_of(QLORA_NOTEBOOK, **FOUND),
        number=64,
        # bitsandbytes needs a GPU; of matrices below 4,096 numbers its states have 32 bits.
        theirs={"optim": "adamw_torch"},
    ),
    "model card": Script(
        training_of(CARD, "training_config", max_seq_length=64, packing=True), adapter_of(CARD), number=60
    ),
    "all of SFTConfig": Script(trl.SFTConfig("x", use_cpu=True, bf16=False).to_dict(), LORA),
    "all of TrainingArguments": Script(transformers.TrainingArguments("x", use_cpu=True).to_dict(), LORA),
    "nothing": Script({}, LORA),
    "SFTConfig without an adapter": Script({"max_length": 32, "max_steps": 6}, None),
    "packed, best fit": Script({"packing": True, "max_length": 48, "num_train_epochs": 1}, LORA, number=100),
    "packed, wrapped": Script(
        {"packing": True, "packing_strategy": "wrapped", "max_length": 48, "num_train_epochs": 1}, LORA, number=100
    ),
    "packed, best fit and split": Script(
        {"packing": True, "packing_strategy": "bfd_split", "max_length": 24, "num_train_epochs": 1}, LORA, number=60
    ),
    "messages": Script({"max_length": 128}, LORA, rows.messages),
    "messages, assistant": Script({"assistant_only_loss": True}, LORA, rows.messages, template=MARKED),
    "prompt and completion": Script({"max_length": None}, LORA, rows.strings),
    "prompt and completion, all": Script({"completion_only_loss": False}, LORA, rows.strings),
    "turns": Script({"packing": False}, LORA, rows.turns),
    "cut": Script({"max_length": 12}, LORA),
    "cut at the beginning": Script({"max_length": 12, "truncation_mode": "keep_end"}, LORA),
    "restarts": scheduled("cosine_with_restarts", lr_scheduler_kwargs={"num_cycles": 2}, warmup_steps=2),
    "least rate": scheduled("cosine_with_min_lr", lr_scheduler_kwargs={"min_lr_rate": 0.1}, warmup_ratio=0.25),
    "polynomial": scheduled("polynomial", lr_scheduler_kwargs={"power": 2.0}),
    "inverse square root": scheduled("inverse_sqrt", warmup_steps=3),
    "constant after warm-up": scheduled("constant_with_warmup", warmup_steps=0.3),
    "stable, then down": scheduled(
        "warmup_stable_decay", warmup_steps=2, lr_scheduler_kwargs={"num_decay_steps": 4, "min_lr_ratio": 0.1}
    ),
    "linear": scheduled("linear", warmup_steps=3),
    "a part of an epoch": Script({"num_train_epochs": 1.5, "per_device_train_batch_size": 3}, LORA, number=13),
    "partial batches": Script(
        {"gradient_accumulation_steps": 3, "per_device_train_batch_size": 2, "num_train_epochs": 2}, LORA, number=13
    ),
    "clipped and decayed": Script(
        {"max_grad_norm": 0.01, "weight_decay": 0.1, "adam_beta1": 0.8, "adam_beta2": 0.95, "learning_rate": 1e-3}, LORA
    ),
    "unclipped": Script({"max_grad_norm": 0, "learning_rate": 1e-3}, LORA),
    "smoothed": Script({"label_smoothing_factor": 0.1, "loss_type": "nll"}, LORA),
    "gradient descent": Script({"optim": "sgd", "learning_rate": 0.1}, LORA),
    "adafactor": Script({"optim": "adafactor", "learning_rate": 1e-3}, LORA),
    "rsLoRA, ranks by name": Script(
        {}, {**LORA, "use_rslora": True, "rank_pattern": {"o_proj": 2}, "alpha_pattern": {"o_proj": 3}}
    ),
    "DoRA": Script({}, {**LORA, "use_dora": True}),
    "saved modules": Script({}, {**LORA, "modules_to_save": ["lm_head"]}),
}
# Older versions' names.
RENAMED = {"max_seq_length": "max_length", "warmup_ratio": "warmup_steps"}
NOT_THERE = ("overwrite_output_dir",)


def for_trl(script: Script, folder: Any) -> Any:
    """The arguments as TRL of today takes them."""
    given = {RENAMED.get(name, name): value for name, value in script.training.items() if name not in NOT_THERE}
    given |= script.theirs or {}
    of_transformers = set(transformers.TrainingArguments.__dataclass_fields__)
    config = transformers.TrainingArguments if set(given) <= of_transformers else trl.SFTConfig
    given = {name: None if str(value).startswith("<") else value for name, value in given.items()}
    return config(
        **{
            **given,
            "output_dir": str(folder / "trl"),
            "train_sampling_strategy": "sequential",
            "bf16": False,
            "use_cpu": True,
            "report_to": "none",
            "save_strategy": "no",
            "disable_tqdm": True,
            "logging_steps": 1000,
            "eval_strategy": "no",
        }
    )


def for_us(script: Script, folder: Any) -> RunConfig:
    training = {**script.training, "train_sampling_strategy": "sequential", "bf16": False}
    data = {"train": str(folder / "rows.jsonl")}
    if script.training.get("eval_strategy") == "steps":
        data["eval"] = data["train"]
    run = RunConfig.from_trl(
        training, script.peft, model={"name_or_path": str(folder / "base"), "dtype": "float32"}, data=data
    )
    # What the comparison needs: PEFT's start, a line for every step, and no evaluations in between.
    changes: dict[str, object] = {
        "training.output_dir": str(folder / "out"),
        "training.logging_steps": 1,
        "training.save_strategy": "no",
        "training.eval_strategy": "no",
        "training.eval_steps": None,
        "logging.progress": False,
        "logging.tensorboard": False,
    }
    if script.peft is not None:
        changes["peft.init_from"] = str(folder / "start")
    return run.changed(changes)


@pytest.mark.slow
@pytest.mark.parametrize("name", SCRIPTS)
def test_steps_are_those_of_sft_trainer(tmp_path, name):
    script = SCRIPTS[name]
    tokenizer = phi3_tokenizer(script.template)
    model = torch_phi3(
        tmp_path / "base", vocab_size=400, max_position_embeddings=512, eos_token_id=tokenizer.eos_token_id
    )
    tokenizer.save_pretrained(tmp_path / "base")
    rng = np.random.default_rng(1)
    made = [script.row(rng) for _ in range(script.number)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in made))
    if script.peft is not None:
        torch.manual_seed(1)
        model = peft.get_peft_model(model, peft.LoraConfig(**script.peft))
        model.save_pretrained(tmp_path / "start")
    theirs = steps_of_trl(
        model,
        for_trl(script, tmp_path),
        train_dataset=datasets.Dataset.from_list(made),
        processing_class=tokenizer,
    )
    ours = our_steps(for_us(script, tmp_path), tmp_path / "out")
    assert len(theirs.losses) >= script.steps
    assert ours.targets == theirs.targets
    np.testing.assert_allclose(ours.rates, theirs.rates, rtol=1e-6, atol=1e-12)
    np.testing.assert_allclose(ours.losses, theirs.losses, atol=1e-5)
