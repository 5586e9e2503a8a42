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
WORDS = ["hen", "the 12", "a", "an egg", "one", "two\n", "42"]


def words(rng: np.random.Generator) -> str:
    return " ".join(rng.choice(WORDS, rng.integers(2, 6))).strip()


def user(rng: np.random.Generator) -> dict[str, Any]:
    return {"role": "user", "content": words(rng)}


def answer(rng: np.random.Generator) -> dict[str, Any]:
    return {"role": "assistant", "content": words(rng)}


def messages(rng: np.random.Generator) -> dict[str, Any]:
    system = {"role": "system", "content": words(rng)}
    return {"messages": [system, user(rng), answer(rng), user(rng), answer(rng)]}


def strings(rng: np.random.Generator) -> dict[str, Any]:
    return {"prompt": words(rng), "completion": f" {words(rng)}"}


def rendered_strings(rng: np.random.Generator) -> dict[str, Any]:
    prompt = f"<|user|>\n{words(rng)}<|end|>\n<|assistant|>\n"
    return {"prompt": prompt, "completion": f"{words(rng)}<|end|>"}


def turns(rng: np.random.Generator) -> dict[str, Any]:
    return {"prompt": [user(rng)], "completion": [answer(rng)]}


def several_turns(rng: np.random.Generator) -> dict[str, Any]:
    return {"prompt": [user(rng), answer(rng), user(rng)], "completion": [answer(rng), user(rng), answer(rng)]}


def text(rng: np.random.Generator) -> dict[str, Any]:
    return {"text": f"<|user|>\n{words(rng)}<|end|>\n<|assistant|>\n{words(rng)}<|end|>\n"}


def plain_text(rng: np.random.Generator) -> dict[str, Any]:
    return {"text": words(rng)}


def ids(rng: np.random.Generator) -> list[int]:
    return rng.integers(260, 350, rng.integers(8, 30)).tolist()


def tokenised(rng: np.random.Generator) -> dict[str, Any]:
    return {"input_ids": ids(rng)}


def labelled(rng: np.random.Generator) -> dict[str, Any]:
    given = ids(rng)
    start = len(given) // 2
    return {"input_ids": given, "labels": [-100] * start + given[start:]}


def masked(name: str) -> Any:
    def row(rng: np.random.Generator) -> dict[str, Any]:
        given = ids(rng)
        mask = (rng.random(len(given)) < 0.5).astype(int)
        mask[1] = 1
        return {"input_ids": given, name: mask.tolist()}

    return row


def tools(rng: np.random.Generator) -> dict[str, Any]:
    definition = {"type": "function", "function": {"name": "f", "description": words(rng), "parameters": {}}}
    call = {"type": "function", "function": {"name": "f", "arguments": {"a": words(rng)}}}
    calling = {"role": "assistant", "content": words(rng), "tool_calls": [call]}
    return {
        "messages": [user(rng), calling, {"role": "tool", "content": words(rng)}, answer(rng)],
        "tools": [definition],
    }


NONE, EOS, ALL = {"template": "none"}, {"final_eos": True}, {"loss_on": "all"}
COMPLETION = {"completion_only_loss": True}
SILENT = {"loss_on": "completion"}  # what TRL does where a script says nothing
PACKED, CUT = {"packing": True, "max_length": 96}, {"truncation_mode": "keep_end", "max_length": 64}
# A row of the set, TRL's settings, and ours that mean the same.
CASES = {
    "messages, the assistant's turns": (messages, {"assistant_only_loss": True}, EOS),
    "messages, all of them": (messages, {}, SILENT),
    "strings": (strings, {}, NONE | EOS | SILENT),
    "strings, all of them": (strings, {"completion_only_loss": False}, NONE | EOS | ALL),
    "strings that are rendered": (rendered_strings, {}, NONE | EOS | SILENT),
    "turns": (turns, {}, EOS | SILENT),
    "several turns": (several_turns, {}, EOS | SILENT),
    "several turns, the marked ones": (several_turns, {"assistant_only_loss": True}, {}),
    "several turns, all of a marked completion": (several_turns, {}, EOS | SILENT),
    "text": (text, {}, NONE | EOS | SILENT),
    "plain text": (plain_text, {}, NONE | EOS | SILENT),
    "input_ids": (tokenised, {}, SILENT),
    "labels": (labelled, {}, SILENT),
    "completion_mask": (masked("completion_mask"), COMPLETION, {}),
    "assistant_masks": (masked("assistant_masks"), {"assistant_only_loss": False}, {}),
    "tools": (tools, {"assistant_only_loss": True}, {}),
    **{
        f"packed by {name}": (
            messages,
            PACKED | {"packing_strategy": name},
            SILENT | PACKED | {"packing_strategy": name},
        )
        for name in ("bfd", "bfd_split", "wrapped")
    },
    "the end is kept": (messages, CUT, SILENT | CUT),
}
QUICK = "several turns"


class Recorder(trl.SFTTrainer):
    """Keeps the loss of every step as it is; the log rounds it."""

    def training_step(self, *arguments: Any, **named: Any) -> Any:
        loss = super().training_step(*arguments, **named)
        self.seen = [*getattr(self, "seen", []), loss.item()]
        return loss


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
