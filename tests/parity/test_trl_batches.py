"""The batches of TRL's SFTTrainer beside ours: the same steps, and in each the same tokens and targets."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
trl = pytest.importorskip("trl")

import datasets  # noqa: E402

from phi3_jax.config.sections import DataSection  # noqa: E402
from phi3_jax.data import prepare_data  # noqa: E402
from phi3_jax.data.run_data import run_batches  # noqa: E402
from tests.helpers.references import torch_phi3  # noqa: E402
from tests.helpers.tokenizers import PHI_3_5, phi3_tokenizer  # noqa: E402
from tests.helpers.trl_rows import answer, messages, plain_text, strings, turns, user, words  # noqa: E402

pytestmark = pytest.mark.filterwarnings(
    "ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::ResourceWarning"
)

BATCH, ACCUMULATION, LENGTH = 2, 3, 48


def late_answers(rng: np.random.Generator) -> dict[str, Any]:
    """Of some rows the completion, or most of it, lies beyond LENGTH tokens."""
    many = [{"role": "user", "content": " ".join(words(rng) for _ in range(rng.integers(1, 5)))}]
    return {"prompt": [user(rng), answer(rng), *many], "completion": [answer(rng)]}


BFD, SPLIT, WRAPPED = ({"packing": True, "packing_strategy": name} for name in ("bfd", "bfd_split", "wrapped"))
# A row, and the settings, which have the same names.
CASES = {
    "messages": (messages, {}),
    "the start is kept": (late_answers, {"truncation_mode": "keep_start"}),
    "the end is kept": (late_answers, {"truncation_mode": "keep_end"}),
    "no limit": (late_answers, {"max_length": None}),
    "bfd": (messages, BFD),
    "bfd, answers that are cut off": (late_answers, BFD),
    "bfd_split": (late_answers, SPLIT),
    "wrapped": (late_answers, WRAPPED),
    "wrapped, all tokens": (messages, WRAPPED),
    "wrapped, text": (plain_text, WRAPPED),
    "strings": (strings, {}),
    "turns, the last batch dropped": (turns, {"dataloader_drop_last": True}),
}
ROWS = 3 * BATCH * ACCUMULATION + BATCH + 1  # of which the last step has fewer, and so has its last batch


def their_steps(rows: list[dict[str, Any]], tokenizer: Any, folder: Any, settings: dict[str, Any]) -> Any:
    """Tokens and targets of each step of an epoch, and how many steps one has."""
    config = trl.SFTConfig(
        output_dir=str(folder / "trl"),
        **{"max_length": LENGTH, **settings},
        per_device_train_batch_size=BATCH,
        gradient_accumulation_steps=ACCUMULATION,
        train_sampling_strategy="sequential",
        num_train_epochs=1.5,
        bf16=False,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
    )
    model = torch_phi3(folder / "base", vocab_size=400, max_position_embeddings=256)
    dataset = datasets.Dataset.from_list(rows)
    trainer = trl.SFTTrainer(model, config, train_dataset=dataset, processing_class=tokenizer)
    loader = trainer.get_train_dataloader()
    *_, total = trainer.set_initial_training_values(config, loader)
    batches = list(loader)
    steps = []
    for start in range(0, len(batches), ACCUMULATION):
        tokens: list[int] = []
        targets: list[int] = []
        for batch in batches[start : start + ACCUMULATION]:
            real = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
            tokens += batch["input_ids"][real].tolist()
            labels = batch["labels"][:, 1:]
            targets += labels[labels != -100].tolist()
        steps.append((tokens, targets))
    return steps, total


def our_steps(rows: list[dict[str, Any]], tokenizer: Any, settings: dict[str, Any]) -> Any:
    settings = {"max_length": LENGTH, "packing": False, **settings}
    drop_last = settings.pop("dataloader_drop_last", False)
    data = DataSection(
        shuffle=False, cache=False, template="none", final_eos=True, loss_on="completion", skip_empty=True, **settings
    )
    prepared = prepare_data(data, tokenizer, seed=0, train=rows)
    batches = run_batches(
        prepared.train,
        data,
        batch_size=BATCH,
        accumulation=ACCUMULATION,
        epochs=1,
        seed=0,
        pad_id=tokenizer.pad_token_id,
        drop_last=drop_last,
    )
    steps = [
        (batch["input_ids"][batch["segment_ids"] > 0].tolist(), batch["input_ids"][batch["loss_mask"] > 0].tolist())
        for batch in batches
    ]
    return steps, math.ceil(1.5 * batches.steps_per_epoch)


@pytest.mark.parametrize("name", CASES)
def test_steps_hold_the_tokens_and_targets_of_sft_trainer(tmp_path, name):
    make, settings = CASES[name]
    tokenizer = phi3_tokenizer(PHI_3_5)
    rng = np.random.default_rng(1)
    rows = [make(rng) for _ in range(ROWS)]
    expected, their_total = their_steps(rows, tokenizer, tmp_path, settings)
    found, our_total = our_steps(rows, tokenizer, settings)
    assert (len(found), our_total) == (len(expected), their_total)
    for step, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        assert ours == theirs, f"step {step}"


def test_the_cases_are_what_they_say():
    rng = np.random.default_rng(1)
    rows = [late_answers(rng) for _ in range(ROWS)]
    data = DataSection(max_length=LENGTH, packing=False, cache=False, skip_empty=True)
    for change, truncated, skipped in (({}, True, True), ({"truncation_mode": "keep_end"}, True, False)):
        stats = prepare_data(replace(data, **change), phi3_tokenizer(PHI_3_5), seed=0, train=rows).train.stats
        assert (stats.truncated > 0, stats.skipped > 0) == (truncated, skipped)
