"""Six steps beside TRL's SFTTrainer: the same files, the same start, and the losses that come of them."""

import json
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
trl = pytest.importorskip("trl")

import datasets  # noqa: E402

from phi3_jax.config.run import RunConfig  # noqa: E402
from phi3_jax.training.loop import train  # noqa: E402
from tests.helpers.references import torch_phi3  # noqa: E402
from tests.helpers.runs import metrics  # noqa: E402
from tests.helpers.tokenizers import CHATML_TOKENS, PHI_3_5, bytes_tokenizer, phi3_tokenizer  # noqa: E402
from tests.helpers.tool_templates import MARKED, MARKED_TOOLS  # noqa: E402
from tests.helpers.trl_rows import (  # noqa: E402
    labelled,
    masked,
    messages,
    plain_text,
    rendered_strings,
    several_turns,
    strings,
    text,
    tokenised,
    tools,
    turns,
)
from tests.helpers.trl_runs import Recorder  # noqa: E402

pytestmark = pytest.mark.filterwarnings(
    "ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::ResourceWarning"
)

STEPS, BATCH = 6, 2
# Of both sides. An epsilon so small that first steps divide gradients by their own size would show float32's rounding.
SHARED = {
    "max_steps": STEPS,
    "per_device_train_batch_size": BATCH,
    "learning_rate": 2e-3,
    "lr_scheduler_type": "constant",
    "adam_epsilon": 1e-4,
    "gradient_checkpointing": False,
    "save_strategy": "no",
}
NONE, EOS, ALL = {"template": "none"}, {"final_eos": True}, {"loss_on": "all"}
COMPLETION = {"completion_only_loss": True}
SILENT = {"loss_on": "completion"}  # what TRL does where a script says nothing
PACKED, CUT = {"packing": True, "max_length": 96}, {"truncation_mode": "keep_end", "max_length": 64}
BFD, SPLIT, WRAPPED = ({"packing_strategy": name} for name in ("bfd", "bfd_split", "wrapped"))
# A row of the set, TRL's settings, and ours that mean the same.
CASES = {
    "messages, the assistant's turns": (messages, {"assistant_only_loss": True}, EOS),
    "messages, all of them": (messages, {}, SILENT),
    "strings": (strings, {}, NONE | EOS | SILENT),
    "strings, all of them": (strings, {"completion_only_loss": False}, NONE | EOS | ALL),
    "strings that are rendered": (rendered_strings, {}, NONE | EOS | SILENT),
    "turns": (turns, {}, EOS | SILENT),
    "several turns": (several_turns, {}, EOS | SILENT),
    "several turns, the marked ones": (several_turns, {"assistant_only_loss": True}, EOS),
    "several turns, all of a marked completion": (several_turns, {}, EOS | SILENT),
    "text": (text, {}, NONE | EOS | SILENT),
    "plain text": (plain_text, {}, NONE | EOS | SILENT),
    "input_ids": (tokenised, {}, SILENT),
    "labels": (labelled, {}, SILENT),
    "completion_mask": (masked("completion_mask"), COMPLETION, {}),
    "assistant_masks": (masked("assistant_masks"), {"assistant_only_loss": False}, {}),
    "tools": (tools, {"assistant_only_loss": True}, {}),
    "packed by bfd": (messages, PACKED | BFD, SILENT | PACKED | BFD),
    "packed by bfd_split": (messages, PACKED | SPLIT, SILENT | PACKED | SPLIT),
    "packed by wrapped": (messages, PACKED | WRAPPED, SILENT | PACKED | WRAPPED),
    "the end is kept": (messages, CUT, SILENT | CUT),
}
QUICK = "several turns"


def losses_of_trl(model: Any, tokenizer: Any, folder: Any, settings: dict[str, Any]) -> list[float]:
    config = trl.SFTConfig(
        output_dir=str(folder / "trl"),
        train_sampling_strategy="sequential",
        bf16=False,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        **SHARED,
        **{"max_length": 256, **settings},
    )
    rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    trainer = Recorder(model, config, train_dataset=datasets.Dataset.from_list(rows), processing_class=tokenizer)
    trainer.train()
    return list(trainer.seen)


def our_losses(folder: Any, settings: dict[str, Any]) -> list[float]:
    run = RunConfig.from_dict(
        {
            "model": {"name_or_path": str(folder / "base"), "dtype": "float32"},
            "peft": {"init_from": str(folder / "start")},
            "data": {
                "train": str(folder / "rows.jsonl"),
                "max_length": 256,
                "packing": False,
                "shuffle": False,
                **settings,
            },
            "training": {
                "output_dir": str(folder / "out"),
                "gradient_accumulation_steps": 1,
                "logging_steps": 1,
                **SHARED,
            },
            "logging": {"progress": False, "tensorboard": False},
        }
    )
    train(run)
    return [line["loss"] for line in metrics(folder / "out") if "loss" in line]


@pytest.mark.parametrize(
    "name", [name if name == QUICK else pytest.param(name, marks=pytest.mark.slow) for name in CASES]
)
def test_losses_are_those_of_sft_trainer(tmp_path, name):
    make, theirs, ours = CASES[name]
    marked = phi3_tokenizer(MARKED if "marked" in name else PHI_3_5)
    tokenizer = bytes_tokenizer(MARKED_TOOLS, CHATML_TOKENS) if make is tools else marked
    base = torch_phi3(
        tmp_path / "base", vocab_size=400, max_position_embeddings=256, eos_token_id=tokenizer.eos_token_id
    )
    tokenizer.save_pretrained(tmp_path / "base")
    rng = np.random.default_rng(1)
    lines = [json.dumps(make(rng)) + "\n" for _ in range((STEPS - 1) * BATCH)]
    (tmp_path / "rows.jsonl").write_text("".join([*lines, *lines[:BATCH]]))
    torch.manual_seed(1)
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    model = peft.get_peft_model(base, config)
    model.save_pretrained(tmp_path / "start")
    expected = losses_of_trl(model, tokenizer, tmp_path, theirs)
    losses = our_losses(tmp_path, ours)
    if "packed" not in name:
        assert expected[-1] < expected[0] - 0.1  # of the same rows: something was learnt
    np.testing.assert_allclose(losses, expected, atol=1e-5)
