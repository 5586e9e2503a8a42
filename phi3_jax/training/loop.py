"""A whole training run, from a configuration to an adapter, its results and a report."""

import math
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NoReturn

import jax

from phi3_jax.config.run import RunConfig
from phi3_jax.data import eval_batches, preview, train_batches
from phi3_jax.data.pipeline import eval_order
from phi3_jax.lora import format_parameter_table
from phi3_jax.optim.optimizer import make_optimizer, make_schedule
from phi3_jax.parallel.distributed import check_agreement, is_main, together
from phi3_jax.parallel.hardware import hardware
from phi3_jax.parallel.mesh import describe_mesh
from phi3_jax.system.files import StorageError, storing
from phi3_jax.training import evaluation, results
from phi3_jax.training.checkpoints import Checkpoints
from phi3_jax.training.checks import check_output_folder, check_settings
from phi3_jax.training.console import RunConsole
from phi3_jax.training.flops import step_flops
from phi3_jax.training.folder import RunFolder
from phi3_jax.training.job import Job, load_job
from phi3_jax.training.metrics import Stopwatch
from phi3_jax.training.preemption import Stopped, StopSignals
from phi3_jax.training.progress import Progress
from phi3_jax.training.step import TrainStep, Window, make_eval_step, make_train_step
from phi3_jax.training.suspects import Suspects
from phi3_jax.training.watch import Watch

# The steps by which rows of every usual length have been met.
WARM_UP_STEPS = 20


def train(run: RunConfig) -> dict[str, Any]:
    """Fine-tunes as `run` says; writes config.yaml, metrics.jsonl, checkpoints/, adapter/ (or model/),
    the result files and report.html under `training.output_dir`.

    **Returns** what all_results.json holds: `train_loss`, and with an evaluation set `eval_loss`,
    `eval_perplexity`, `eval_token_accuracy` and, where rows were answered, `exact_match`.

    On several hosts every one of them calls this (`parallel.distributed.initialize` first), and the
    first one writes, to storage that they share.

    SIGTERM and SIGINT stop it after the step, or the batch of an evaluation, that it is at: a checkpoint is
    saved, and `SystemExit` of status 143 raised, or `KeyboardInterrupt`.

    Raises `InputError` for wrong settings, data or checkpoints before anything is written, `StorageError`
    where a disk takes no more (the weights are then in `training.fallback_dir`, where that is given), and
    `FloatingPointError` where more than `training.max_skipped_steps` steps in a row had a loss or gradient
    that is not finite, or an evaluation has such a loss; the last good adapter is saved before.
    """
    check_agreement({"configuration": run.to_yaml()})
    with together():
        check_settings(run)
        check_output_folder(run)
    job = load_job(run)
    with job.devices.in_use(), StopSignals() as signals:
        trainer = Trainer(run, job, signals)
        try:
            return trainer.run_all()
        except StorageError as error:
            raise StorageError(f"{error}; {trainer.rescue()}") from error
        finally:
            trainer.close()


class Trainer:
    """A run in progress: `begin`, `loop`, `finish`, all of them by `run_all`, and `close` in any case.

    The host runs ahead of the device. It waits for results when a line of metrics is due, for an
    evaluation, for a checkpoint and for a compilation, and not otherwise.
    """

    def __init__(self, run: RunConfig, job: Job, signals: StopSignals | None = None):
        training = run.training
        self.run, self.job = run, job
        self.signals = signals or StopSignals()
        self.folder = Path(training.output_dir)
        self.batch_size = job.devices.batch_size(training.per_device_train_batch_size)
        self.eval_batch_size = job.devices.batch_size(training.per_device_eval_batch_size)
        self.batches = train_batches(
            job.data.train,
            run.data,
            batch_size=self.batch_size,
            part=job.devices.rows_here(self.batch_size),
            accumulation=training.gradient_accumulation_steps,
            epochs=None,  # as many as it takes; the loop counts steps
            seed=training.seed,
            pad_id=job.pad_id,
        )
        self.epoch_steps = self.batches.steps_per_epoch
        epochs = math.ceil(self.epoch_steps * training.num_train_epochs)
        self.total_steps = training.max_steps if training.max_steps > 0 else epochs
        self.evaluates = job.data.eval is not None and training.eval_strategy != "no"
        self.schedule = make_schedule(training, self.total_steps)
        check_agreement({"training rows": self.batches.fingerprint})
        tx = make_optimizer(training, self.schedule, job.frozen["lora"])
        self.state = job.first_state(tx)
        self.train_step = TrainStep(make_train_step(job.graph, job.dtype, tx, training))
        self.eval_step = make_eval_step(job.graph, job.dtype)
        self.progress = Progress()
        self.console = RunConsole(progress=run.logging.progress, quiet=not is_main())
        self.stopwatch = Stopwatch()
        self.watch = Watch(run, job, self.batches, self.eval_step, self.console.print)
        self.files = RunFolder(run, self.console.print)
        self.written: Path | None = None  # where the weights lie at the end

    def run_all(self) -> dict[str, Any]:
        """Runs to the end, or to where a signal stops it."""
        try:
            self.begin()
            self.loop()
            return self.finish()
        except Stopped:
            self.save()
            self.signals.leave()

    def begin(self) -> None:
        """Opens the output folder; restores the newest checkpoint, or evaluates the start."""
        training = self.run.training
        self._tell_plan()
        self.files.open()
        restored = self.files.checkpoints is not None and self._restore(self.files.checkpoints)
        if training.resume_from_checkpoint and not restored:
            self.console.print(f"{self.folder} holds no complete checkpoint to resume: starting at step 0")
        self.progress.rows = self.files.open_metrics(self.progress.rows)
        if self.evaluates and not restored:
            self._evaluate("before")
            self.progress.answers_before = self._answers()

    def _tell_plan(self) -> None:
        training, console = self.run.training, self.console
        rows = self.batch_size * training.gradient_accumulation_steps
        console.print(format_parameter_table(self.job.table))
        console.print(self.job.data.summary())
        console.print(f"first row, targets in ⟦⟧: {preview(self.job.data.train, self.job.tokenizer)}")
        console.print(describe_mesh(self.job.devices.mesh))
        console.print(
            f"{self.total_steps} steps of {rows} rows ({self.epoch_steps} an epoch), "
            f"{training.optim}, learning rate {training.learning_rate:g} {training.lr_scheduler_type}"
        )

    def loop(self) -> None:
        """Takes steps until all are done, or patience is over."""
        self.console.start(self.progress.step, self.total_steps)
        self.stopwatch.start()
        if self._evaluation_is_due() and self.progress.evaluated_step < self.progress.step:
            self._evaluate_and_save()  # it was stopped there
        while not self._is_last(self.progress.step):
            self._take_step()
            self._after_step()
            if self.signals.reached(self.progress.step):
                raise Stopped
        if self.progress.logged_step < self.progress.step:
            self._log()
        self._check_end()
        self.console.stop()

    def finish(self) -> dict[str, Any]:
        """Evaluates, and writes the weights, the results and the report."""
        training, progress = self.run.training, self.progress
        if self.files.checkpoints is not None:
            self.files.checkpoints.wait()  # so that a disk that is full shows while these weights are here
        if training.load_best_model_at_end and progress.best_step not in (None, progress.step):
            assert self.files.checkpoints is not None
            best, _ = self.files.checkpoints.restore(self.state, progress.best_step)
            self.state = replace(self.state, trainable=best.trainable)
            progress.evaluations["last"] = progress.evaluations["best"]
            self.console.print(f"loaded the best checkpoint, step {progress.best_step}")
        answers = self._answers() if self.evaluates else []
        before = self._figures("before", progress.answers_before)
        after = self._figures("last", answers)
        figures = progress.results(self.epoch_steps, self.job.data.train.stats.rows)
        self.written = results.save_weights(self.folder, self.run, self.job, self.state.trainable)
        with together():
            if is_main():
                assert self.files.metrics is not None
                with storing(self.folder):
                    results.write_results(self.folder, figures, after)
                    samples = results.samples(self.job, progress.answers_before, answers)
                    results.report(self.run, self.job, self.files.metrics.history, before, after, samples, figures)
        self.console.before_and_after(before, after)
        self.console.print(f"wrote {self.written} and {self.folder / 'report.html'}")
        return {**figures, **after}

    def save(self) -> None:
        """Saves a checkpoint now, whatever `save_strategy` is."""
        self.console.stop()
        self._pause()
        said = "nothing to save before the first step"
        if self.progress.step:
            self._save(None)
            self.files.open_checkpoints().wait()
            said = f"saved the checkpoint of step {self.progress.step}; go on with training.resume_from_checkpoint true"
        self.console.print(f"stopped: {said}")

    def rescue(self) -> str:
        """Saves the weights as they are in `fallback_dir`, after the output folder failed; says what is where."""
        self.console.stop()
        step, fallback = self.progress.step, self.run.training.fallback_dir
        kept = self.files.kept()
        if self.written is not None:
            return f"the weights of step {step} are in {self.written}"
        if not step:
            return kept
        if fallback is None:
            return f"{kept}; training.fallback_dir would name a folder for the weights of step {step}"
        folder = Path(fallback) / f"{self.folder.absolute().name}-step{step}"
        try:
            target = results.save_weights(folder, self.run, self.job, self.state.trainable)
        except StorageError as error:
            return f"{kept}; nor can the weights of step {step} be saved in training.fallback_dir: {error}"
        return f"{kept}; the weights of step {step} are in {target}"

    def close(self) -> None:
        self.console.stop()
        self.files.close()

    # A step, and what is due after it.

    def _take_step(self) -> None:
        batch = self.job.devices.put(next(self.batches), self.batch_size)
        if not self.train_step.is_compiled(batch):
            self._pause()
            self._warn_of_compilation(batch["input_ids"].shape[-1])
            self.train_step.compile(self.state, self.job.frozen, batch)
            self.stopwatch.start()
        self.state = self.train_step(self.state, self.job.frozen, batch)
        self.progress.step += 1
        self.console.advance(self.progress.step)

    def _warn_of_compilation(self, length: int) -> None:
        """Rows come in few lengths, so that a program for a new one is rare after the first steps."""
        if self.train_step.compilations and self.progress.step >= WARM_UP_STEPS:
            self.console.print(
                f"warning: step {self.progress.step + 1} compiles the train step again, for rows of {length} positions "
                f"({self.train_step.compilations + 1} programs so far); data.packing gives all rows one length"
            )

    def _after_step(self) -> None:
        step = self.progress.step
        is_due = step % self.run.training.logging_steps == 0 or step == self.total_steps
        if is_due or (self.run.training.debug_nans and self._look_after_skips()):
            self._log()
        self._evaluate_and_save()

    def _evaluation_is_due(self) -> bool:
        training, step = self.run.training, self.progress.step
        last = step == self.total_steps
        return step > 0 and self.evaluates and self._is_due(training.eval_strategy, training.eval_steps, last)

    def _evaluate_and_save(self) -> None:
        training, step = self.run.training, self.progress.step
        eval_loss, is_best = None, False
        if self._evaluation_is_due():
            self._pause()
            eval_loss = self._evaluate("last")
            is_best = self._rank()
            self.stopwatch.start()
        due = self._is_due(training.save_strategy, training.save_steps, self._is_last(step))
        if due or (is_best and training.load_best_model_at_end):
            self._pause()
            # Else weights that nothing but skipped steps have seen could drive the good ones out.
            if not jax.device_get(self.state.skips.in_a_row):
                self._save(eval_loss)
            self.stopwatch.start()

    def _is_due(self, strategy: str, steps: int | None, last: bool) -> bool:
        """Whether what happens every epoch, or every so many steps, and at the end, is due now."""
        every = self.epoch_steps if strategy == "epoch" else steps
        return strategy != "no" and (last or (every is not None and self.progress.step % every == 0))

    def _is_last(self, step: int) -> bool:
        patience = self.run.training.early_stopping_patience
        return step >= self.total_steps or (patience is not None and self.progress.waited >= patience)

    def _pause(self) -> None:
        """Stops the clock, once the device has done what it was given."""
        jax.block_until_ready(self.state)
        seconds = self.stopwatch.stop()
        self.progress.seconds += seconds
        self.progress.window_seconds += seconds

    def _log(self) -> None:
        """Writes a line of metrics for the steps since the last one."""
        assert self.files.metrics is not None
        progress = self.progress
        is_over = self._look_after_skips()
        window: Window = jax.device_get(self.state.window)
        self._pause()
        self.stopwatch.start()
        self.state = replace(self.state, window=self.job.devices.replicate(Window.empty()))
        progress.loss += float(window.loss)
        progress.tokens += int(window.tokens)
        progress.target_tokens += int(window.target_tokens)
        row = {
            "step": progress.step,
            "epoch": progress.step / self.epoch_steps,
            # Where all steps were skipped there is none.
            **({"loss": float(window.loss) / int(window.target_tokens)} if window.target_tokens else {}),
            "learning_rate": float(self.schedule(max(0, progress.step - progress.skipped - 1))),
            **({"grad_norm": float(window.grad_norm)} if window.target_tokens else {}),
            "skipped": progress.skipped,
            "tokens": progress.tokens,
            "target_tokens": progress.target_tokens,
            "tokens_per_second": int(window.tokens) / progress.window_seconds,
            "compilations": self.train_step.compilations,
        }
        if (peaks := hardware()) is not None:
            flops = step_flops(
                self.job.config,
                self.job.table.trainable,
                self.run.peft.full_finetuning,
                int(window.tokens),
                float(window.attended),
            )
            row["mfu"] = flops / progress.window_seconds / (peaks.flops * self.job.devices.mesh.size)
        progress.window_seconds, progress.logged_step = 0.0, progress.step
        self._write(row)
        if is_over:
            limit = self.run.training.max_skipped_steps
            self._stop(
                f"the loss or its gradient is not finite, more than training.max_skipped_steps {limit} times in a row"
            )

    # Numbers that are not finite.

    def _look_after_skips(self) -> bool:
        """Tells of steps that were skipped since the last look; whether they are too many in a row."""
        self._pause()
        skips = self.watch.look(self.state, self.progress.skipped)
        self.progress.skipped = int(skips.total)
        self.stopwatch.start()
        return int(skips.in_a_row) > self.run.training.max_skipped_steps

    def _check_end(self) -> None:
        """Where the last steps were skipped, nothing has shown yet that the weights are good."""
        skips = jax.device_get(self.state.skips)
        step = skips.last_taken(self.progress.step)
        if skips.in_a_row and (step < 0 or not self.watch.is_good(self.state, step)):
            self._stop(f"the loss or its gradient was not finite in the last {int(skips.in_a_row)} steps")

    def _stop(self, why: str) -> NoReturn:
        """Saves the last adapter that is known to be good, and ends the run."""
        self.console.stop()
        skips = jax.device_get(self.state.skips)
        if skips.taken(self.progress.step) == 0:
            saved = "no step was taken, so there is no adapter to save"
        elif self.state.good is None:
            saved = self.files.kept()
        else:
            target = results.save_weights(self.folder, self.run, self.job, self.state.good)
            started = skips.last_taken(self.progress.step) + 1
            saved = f"{target} holds the adapter that step {started} started from, the last one with a finite loss"
        raise FloatingPointError(
            f"step {self.progress.step}: {why}; {saved}; lower training.learning_rate, give model.dtype bfloat16 or "
            "float32 if it is float16, or have training.debug_nans name the layer"
        )

    def _write(self, row: dict[str, Any]) -> None:
        assert self.files.metrics is not None
        with together():
            self.files.metrics.write(row)
        self.progress.rows += 1
        self.console.figures(row, self.total_steps)

    # Evaluation.

    def _evaluate(self, name: str) -> float:
        """Writes a line of figures and remembers them under `name`; returns the loss."""
        batches = eval_batches(
            self.job.data.eval,
            self.run.data,
            batch_size=self.eval_batch_size,
            part=self.job.devices.rows_here(self.eval_batch_size),
            pad_id=self.job.pad_id,
        )

        def put(batch: dict[str, Any]) -> dict[str, Any]:
            self.signals.check()
            return self.job.devices.put(batch, self.eval_batch_size)

        figures = evaluation.evaluate_rows(self.eval_step, self.state.trainable, self.job.frozen, map(put, batches))
        if not math.isfinite(figures["eval_loss"]):
            rows = self.job.data.eval
            suspects = Suspects(self.job, self.run.data, self.eval_step, rows, self.eval_batch_size)
            why = suspects.describe(self.state.trainable, eval_order(rows, self.run.data))
            self._stop(f"the evaluation's loss is not finite: {why}")
        self.progress.evaluations[name], self.progress.evaluated_step = figures, self.progress.step
        epoch = self.progress.step / self.epoch_steps
        numbers = {key: value for key, value in figures.items() if not key.endswith("_interval")}
        self._write({"step": self.progress.step, "epoch": epoch, **numbers})
        return figures["eval_loss"]

    def _rank(self) -> bool:
        """Whether the last evaluation's loss is the lowest so far."""
        progress, figures = self.progress, self.progress.evaluations["last"]
        best = progress.evaluations.get("best")
        if best is not None and figures["eval_loss"] >= best["eval_loss"]:
            progress.waited += 1
            return False
        progress.evaluations["best"], progress.best_step, progress.waited = figures, progress.step, 0
        return True

    def _answers(self) -> list[str]:
        if not self.job.prompts:
            return []
        self.signals.check()
        model, lora = self.job.model_and_lora(self.state.trainable)
        return evaluation.answer(
            model,
            lora,
            self.job.tokenizer,
            self.job.prompts,
            batch_size=self.eval_batch_size,
            max_new_tokens=self.run.training.eval_max_new_tokens,
            end_ids=self.job.end_ids,
        )

    def _figures(self, name: str, answers: list[str]) -> dict[str, Any]:
        figures = dict(self.progress.evaluations.get(name, {}))
        if answers:
            figures |= evaluation.exact_match(answers, self.job.prompts)
        return figures

    # Checkpoints.

    def _save(self, eval_loss: float | None) -> None:
        """Saves everything that the rest of the run depends on; `eval_loss`, if it was just measured."""
        assert self.files.metrics is not None
        self.progress.data = self.batches.get_state()
        with together():
            self.files.metrics.sync()
        self.files.open_checkpoints().save(self.progress.step, self.state, asdict(self.progress), eval_loss)

    def _restore(self, checkpoints: Checkpoints) -> bool:
        if not checkpoints.steps:
            return False
        self.state, saved = checkpoints.restore(self.state)
        self.progress = Progress(**saved)
        self.batches.set_state(self.progress.data)
        self.console.print(f"resuming at step {self.progress.step} of {self.total_steps}")
        return True
