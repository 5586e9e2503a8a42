"""One model on the rows: token sums batch by batch, and answers, as training and generation make them."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import jax
import numpy as np
from flax import nnx

from phi3_jax.config.generation import GenerationConfig
from phi3_jax.config.sections import DataSection
from phi3_jax.data import TokenizedRows, eval_batches
from phi3_jax.data.pipeline import eval_order
from phi3_jax.data.tokenizer import Tokenizer
from phi3_jax.evaluate.metric import Metric, Scores
from phi3_jax.evaluate.metrics import TokenLoss
from phi3_jax.evaluate.predictions import Prediction
from phi3_jax.generation.text import answer_prompts, prompt_seeds
from phi3_jax.lora import Lora
from phi3_jax.model import Phi3ForCausalLM
from phi3_jax.parallel.devices import Devices
from phi3_jax.system.errors import InputError
from phi3_jax.training.evaluation import row_token_sums
from phi3_jax.training.step import Params, make_eval_step


@dataclass(frozen=True)
class Task:
    """What every model is to do.

    Attributes:
        tokenizer: The base's.
        rows: What is evaluated.
        data: The section that `rows` are of.
        metrics: What is measured.
        settings: How to answer.
        pad_id: The token that fills rows.
        devices: Where the models are.
        rows_each: Rows of a forward pass on each of the devices.
    """

    tokenizer: Tokenizer
    rows: TokenizedRows
    data: DataSection
    metrics: Sequence[Metric]
    settings: GenerationConfig
    pad_id: int
    devices: Devices
    rows_each: int

    @property
    def batch_size(self) -> int:
        """Rows of a forward pass over all devices."""
        return self.devices.batch_size(self.rows_each)

    @property
    def needs_answers(self) -> bool:
        """Whether the models have to answer."""
        return any(metric.needs_answers for metric in self.metrics)

    @property
    def needs_loss(self) -> bool:
        """Whether the rows' losses are asked for."""
        return any(isinstance(metric, TokenLoss) for metric in self.metrics)

    def prompt(self, row: int) -> list[int]:
        """The tokens before a row's last assistant turn; none where there is no such turn."""
        prompt: list[int] = self.rows[row][0][: self.rows.prompt_lengths[row]].tolist()
        return prompt


class Runner:
    """A model that is loaded, with whichever adapter.

    Args:
        model: The model; its weights move to where the mesh has them.
        devices: Where it is to be.

    Attributes:
        model: The model on its devices.
    """

    def __init__(self, model: Phi3ForCausalLM, devices: Devices) -> None:
        self._graph, state = nnx.split(model)
        self._state, _ = devices.spread((state, None))
        self.model = nnx.merge(self._graph, self._state)
        self._eval_step = make_eval_step(self._graph, model.dtype)

    def predictions(self, task: Task, name: str, lora: Lora | None, rows: Sequence[int]) -> Iterator[Prediction]:
        """What the model makes of these rows, as batches finish; in no certain order.

        Args:
            task: What to do.
            name: The model's, for messages.
            lora: An adapter, None for the model itself.
            rows: Which of the task's rows.

        Raises:
            InputError: A row's loss is not finite.
        """
        lora = task.devices.spread({"model": None, "lora": lora})["lora"]
        losses = self._losses(task, name, lora, rows) if task.needs_loss else iter(())
        if not task.needs_answers:
            for row, scores in losses:
                yield self._prediction(task, row, None, None, scores)
            return
        known = dict(losses)
        seeds = prompt_seeds(task.settings, len(task.rows))
        answers = answer_prompts(
            self.model,
            task.tokenizer,
            [task.prompt(row) for row in rows],
            lora=lora,
            settings=task.settings.with_(seed=tuple(seeds[row] for row in rows)),
            batch_size=task.batch_size,
        )
        for index, answer in answers:
            row = rows[index]
            yield self._prediction(task, row, answer.text, answer.finish_reason, known.get(row, {}))

    def _losses(self, task: Task, name: str, lora: Lora | None, rows: Sequence[int]) -> Iterator[tuple[int, Scores]]:
        devices, chosen = task.devices, _select(task.rows, rows)
        size = task.batch_size
        batches = eval_batches(chosen, task.data, batch_size=size, part=devices.rows_here(size), pad_id=task.pad_id)
        order = [sequence[0] for sequence in eval_order(chosen, task.data)]
        parts = (order[start : start + size] for start in range(0, len(order), size))
        params: Params = {"model": self._state, "lora": lora}
        nothing = jax.tree.map(lambda _: None, params)
        on_device = ((part, devices.put(batch, size)) for part, batch in zip(parts, batches, strict=True))
        for index, (loss, target_tokens, right_tokens) in row_token_sums(self._eval_step, params, nothing, on_device):
            if not math.isfinite(loss):
                raise InputError(
                    f"{name}: the loss of row {rows[index] + 1} is not finite; evaluate in bfloat16 or float32 if the "
                    "dtype is float16, and otherwise look into the weights"
                )
            yield rows[index], TokenLoss.of_sums(loss, target_tokens, right_tokens)

    def _prediction(
        self, task: Task, row: int, answer: str | None, finish_reason: str | None, scores: Scores
    ) -> Prediction:
        reference = task.rows.references[row]
        if answer is not None:
            for metric in task.metrics:
                scores = {**scores, **metric.score(answer, reference)}
        prompt = task.prompt(row)
        text = task.tokenizer.decode(prompt, skip_special_tokens=False) if prompt else None
        return Prediction(row, text, reference, answer, finish_reason, scores)


def _select(rows: TokenizedRows, chosen: Sequence[int]) -> TokenizedRows:
    """Some of the rows, by themselves."""
    parts = [rows[row] for row in chosen]
    return TokenizedRows(
        np.concatenate([ids for ids, _ in parts]),
        np.concatenate([mask for _, mask in parts]),
        np.concatenate([[0], np.cumsum([len(ids) for ids, _ in parts])]),
        rows.prompt_lengths[list(chosen)],
        [rows.references[row] for row in chosen],
        rows.stats,
    )
