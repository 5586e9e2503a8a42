"""A run's evaluations: its own rows and prompts, on its devices, with the weights as they are."""

from phi3_jax.config.run import RunConfig
from phi3_jax.config.sections import EVAL
from phi3_jax.data import eval_batches
from phi3_jax.data.batch import DeviceBatch, HostBatch
from phi3_jax.data.pipeline import eval_order
from phi3_jax.training import evaluation
from phi3_jax.training.evaluation import EvalFigures
from phi3_jax.training.job import RunJob
from phi3_jax.training.preemption import StopSignals
from phi3_jax.training.step import Params, make_eval_step
from phi3_jax.training.suspects import Suspects


class Evaluator:
    """Evaluates a run's model.

    Args:
        run: its settings.
        job: its rows, prompts and devices.
        signals: what can stop it between batches.

    Attributes:
        step: the compiled evaluation of a batch.
        wanted: whether there are rows to evaluate, and the run asks for it.
    """

    def __init__(self, run: RunConfig, job: RunJob, signals: StopSignals):
        self._run, self._job, self._signals = run, job, signals
        self._data = run.data.evaluation
        self._batch_size = job.devices.batch_size(run.training.per_device_eval_batch_size)
        self.step = make_eval_step(job.graph, job.dtype)
        self.wanted = bool(job.data.eval_sets) and run.training.eval_strategy != "no"

    def figures(self, trainable: Params) -> EvalFigures:
        """Loss, perplexity and accuracy over the evaluation rows, of each set by itself too where they have names."""
        job, size = self._job, self._batch_size
        here = job.devices.rows_here(size)

        def put(batch: HostBatch) -> DeviceBatch:
            self._signals.check()
            return job.devices.put(batch, size)

        sets = {
            name: map(put, eval_batches(rows, self._data, batch_size=size, part=here, pad_id=job.pad_id))
            for name, rows in job.data.eval_sets.items()
        }
        return evaluation.evaluate_rows(self.step, trainable, job.frozen, sets)

    def why_not_finite(self, trainable: Params) -> str:
        """Which rows a loss that is not finite comes from, in words."""
        data, found = self._data, []
        for name, rows in self._job.data.eval_sets.items():
            suspects = Suspects(self._job, data, self.step, rows, self._batch_size)
            order = eval_order(rows, data)
            if suspects.among(trainable, order) or len(self._job.data.eval_sets) == 1:
                of = "" if name == EVAL else f"{name}: "
                found.append(f"{of}{suspects.describe(trainable, order)}")
        return "; ".join(found) or "the loss of each row by itself is finite"

    def answers(self, trainable: Params) -> list[str]:
        """Answers to the run's prompts; none where there are none."""
        if not self.wanted or not self._job.prompts:
            return []
        self._signals.check()
        model, lora = self._job.model_and_lora(trainable)
        return evaluation.answer(
            model,
            lora,
            self._job.tokenizer,
            self._job.prompts,
            batch_size=self._batch_size,
            max_new_tokens=self._run.training.eval_max_new_tokens,
            end_ids=self._job.end_ids,
        )

    def with_answers(self, figures: EvalFigures, answers: list[str]) -> EvalFigures:
        """The figures, and how many of the answers are right where there are any."""
        return {**figures, **evaluation.exact_match(answers, self._job.prompts)} if answers else figures
