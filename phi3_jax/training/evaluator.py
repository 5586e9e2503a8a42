"""A run's evaluations: its own rows and prompts, on its devices, with the weights as they are."""

from phi3_jax.config.run import RunConfig
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
        self._batch_size = job.devices.batch_size(run.training.per_device_eval_batch_size)
        self.step = make_eval_step(job.graph, job.dtype)
        self.wanted = job.data.eval is not None and run.training.eval_strategy != "no"

    def figures(self, trainable: Params) -> EvalFigures:
        """Loss, perplexity and accuracy over the evaluation rows."""
        job, size = self._job, self._batch_size
        assert job.data.eval is not None
        batches = eval_batches(
            job.data.eval, self._run.data, batch_size=size, part=job.devices.rows_here(size), pad_id=job.pad_id
        )

        def put(batch: HostBatch) -> DeviceBatch:
            self._signals.check()
            return job.devices.put(batch, size)

        return evaluation.evaluate_rows(self.step, trainable, job.frozen, map(put, batches))

    def why_not_finite(self, trainable: Params) -> str:
        """Which rows a loss that is not finite comes from, in words."""
        rows, data = self._job.data.eval, self._run.data
        assert rows is not None
        suspects = Suspects(self._job, data, self.step, rows, self._batch_size)
        return suspects.describe(trainable, eval_order(rows, data))

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
