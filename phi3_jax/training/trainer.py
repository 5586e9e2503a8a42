"""A run in progress: its steps, and what is due after each of them."""

import math
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NoReturn

import jax

from phi3_jax.config.profiled import check_steps_come
from phi3_jax.config.run import RunConfig
from phi3_jax.data.streaming import StreamedRows
from phi3_jax.optim.optimizer import make_optimizer
from phi3_jax.optim.schedule import make_schedule
from phi3_jax.parallel.distributed import is_main, together
from phi3_jax.parallel.hardware import hardware
from phi3_jax.system.errors import InputError
from phi3_jax.system.files import storing
from phi3_jax.training import endings, results
from phi3_jax.training.adapter_files import RunAdapter
from phi3_jax.training.announce import announce
from phi3_jax.training.console import RunConsole
from phi3_jax.training.evaluation import value
from phi3_jax.training.evaluator import Evaluator
from phi3_jax.training.flops import step_flops
from phi3_jax.training.folder import RunFolder
from phi3_jax.training.job import RunJob
from phi3_jax.training.metrics import Row
from phi3_jax.training.preemption import Stopped, StopSignals
from phi3_jax.training.profile import StepProfiler
from phi3_jax.training.progress import Progress, Stopwatch, rank_of
from phi3_jax.training.push import RunPush
from phi3_jax.training.step import TrainStep, Window, make_train_step
from phi3_jax.training.timetable import Timetable
from phi3_jax.training.watch import Watch

Results = dict[str, Any]  # numbers, and pairs of numbers for intervals; Any, so that a caller may reckon with them

# The steps by which rows of every usual length have been met.
WARM_UP_STEPS = 20


class Trainer:
    """A run in progress: `begin`, `loop`, `finish`, all of them by `run_all`, and `close` in any case.

    The host runs ahead of the device. It waits for results when a line of metrics is due, for an
    evaluation, for a checkpoint and for a compilation, and not otherwise.
    """

    def __init__(self, run: RunConfig, job: RunJob, signals: StopSignals | None = None, push: RunPush | None = None):
        training = run.training
        self.run, self.job, self.push = run, job, push
        self.signals = signals or StopSignals()
        self.batch_size = job.devices.batch_size(training.per_device_train_batch_size)
        self.batches = job.batches
        self.epoch_steps = self.batches.steps_per_epoch
        self.evaluator = Evaluator(run, job, self.signals)
        self.timetable = Timetable(training, self.epoch_steps, self.evaluator.wanted)
        self.total_steps = self.timetable.total_steps
        if (profiled := run.logging.profiled_steps) is not None:
            check_steps_come(profiled, self.total_steps)
        self.schedule = make_schedule(training, self.total_steps)
        tx = make_optimizer(training, self.schedule, job.frozen["lora"])
        self.state = job.first_state(tx)
        function = make_train_step(job.graph, job.dtype, tx, training)
        self.train_step = TrainStep(function, training.compiler_options, job.ahead)
        self.progress = Progress()
        self.console = RunConsole(progress=run.logging.progress)
        self.stopwatch = Stopwatch()
        self.watch = Watch(run, job, self.batches, self.evaluator.step, self.console.print)
        self.files = RunFolder(run, self.console.print)
        self.profiler = StepProfiler(profiled, self.files.path, self.console.print)
        self.adapter = RunAdapter(run, job)
        self.written: Path | None = None  # where the weights lie at the end

    def run_all(self) -> Results:
        """Runs to the end, or to where a signal stops it."""
        try:
            self.begin()
            self.loop()
            return self.finish()
        except Stopped:
            self.save()
            self.signals.leave()

    def begin(self) -> None:
        """Opens the output folder; restores the checkpoint to go on from, or evaluates the start."""
        announce(self.run, self.job, self.timetable, self.batch_size, self.console.print)
        self.files.open()
        if self.files.checkpoints is not None and self.push is not None:
            self.files.checkpoints.on_saved = self.push.checkpoint
        restored = self._restore()
        if self.files.point is not None and not restored:
            self.console.print(f"{self.files.path} holds no complete checkpoint to resume: starting at step 0")
        self.progress.rows = self.files.open_metrics(self.progress.rows)
        if self.evaluator.wanted and self.run.training.eval_on_start and not restored:
            self._evaluate("before")
            self.progress.answers_before = self.evaluator.answers(self.state.trainable)

    def loop(self) -> None:
        """Takes steps until all are done, or patience is over."""
        progress = self.progress
        self.console.start(progress.step, self.total_steps)
        self.stopwatch.start()
        if self.timetable.evaluation_is_due(progress.step) and progress.evaluated_step < progress.step:
            self._evaluate_and_save()  # it was stopped there
        while not self.timetable.is_last(progress):
            try:
                self._take_step()
            except StopIteration:
                self._run_out()
                continue
            self._after_step()
            if self.signals.reached(progress.step):
                raise Stopped
        if progress.logged_step < progress.step:
            self._log()
        self._check_end()
        self.console.stop()

    def finish(self) -> Results:
        """Evaluates, and writes the weights, the results and the report."""
        job, progress, folder = self.job, self.progress, self.files.path
        if self.files.checkpoints is not None:
            self.files.checkpoints.wait()  # so that a disk that is full shows while these weights are here
        if self.run.training.load_best_model_at_end:
            self._load_best()
        answers = self.evaluator.answers(self.state.trainable)
        before = self.evaluator.with_answers(progress.evaluations.get("before", {}), progress.answers_before)
        after = self.evaluator.with_answers(progress.evaluations.get("last", {}), answers)
        figures = progress.results(self.batches.epochs_at(progress.step), job.data.train.stats.rows)
        self.written = results.save_weights(folder, self.run, job, self.state.trainable)
        with together():
            if is_main():
                with storing(folder):
                    results.write_results(folder, figures, after)
                    samples = results.samples(job, progress.answers_before, answers)
                    results.report(self.run, job, self.files.log.history, before, after, samples, figures)
        if isinstance(job.data.train, StreamedRows):
            self.console.print(job.data.train.summary())
        self.console.before_and_after(before, after)
        self.console.result(f"wrote {self.written} and {folder / 'report.html'}")
        with together():
            if self.push is not None:
                self.push.finish(self.written)
        return {**figures, **after}

    def _load_best(self) -> None:
        progress = self.progress
        if progress.best_step in (None, progress.step):
            return
        best, _ = self.files.open_checkpoints().restore(self.state, progress.best_step)
        self.state = replace(self.state, trainable=best.trainable)
        progress.evaluations["last"] = progress.evaluations["best"]
        self.console.print(f"loaded the best checkpoint, step {progress.best_step}")

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
        """Saves the weights elsewhere where they are not saved yet, after the output folder failed; says where."""
        self.console.stop()
        step = self.progress.step
        if self.written is not None:
            return f"the weights of step {step} are in {self.written}"
        return endings.rescue(self.run, self.job, self.files, self.state, step)

    def close(self) -> None:
        """Lets the output folder go."""
        self.console.stop()
        self.profiler.close(self.progress.step)
        self.batches.close()
        self.files.close()

    # A step, and what is due after it.

    def _take_step(self) -> None:
        try:
            with jax.profiler.TraceAnnotation("rows"):
                host_batch = next(self.batches)
        except InputError:  # of a row that was not read before
            self.save()
            raise
        batch = self.job.devices.put(host_batch, self.batch_size)
        if not self.train_step.is_compiled(batch):
            self._pause()
            self._warn_of_compilation(batch["input_ids"].shape[-1])
            self.train_step.compile(self.state, self.job.frozen, batch)
            self.stopwatch.start()
        with self.profiler.step(self.progress.step + 1):
            self.state = self.train_step(self.state, self.job.frozen, batch)
        self.progress.step += 1
        self.console.advance(self.progress.step)
        if self.profiler.is_last(self.progress.step):
            self._pause()
            self.profiler.finish(self.progress.step)
            self.stopwatch.start()

    def _warn_of_compilation(self, length: int) -> None:
        """Rows come in few lengths, so that a program for a new one is rare after the first steps."""
        if self.train_step.compilations and self.progress.step >= WARM_UP_STEPS:
            self.console.print(
                f"warning: step {self.progress.step + 1} compiles the train step again, for rows of {length} positions "
                f"({self.train_step.compilations + 1} programs so far); data.packing gives all rows one length"
            )

    def _after_step(self) -> None:
        step, timetable = self.progress.step, self.timetable
        if (
            timetable.line_is_due(step)
            or (timetable.look_is_due(step) and self._collect())
            or (self.run.training.debug_nans and self._look_after_skips())
        ):
            self._log()
        self._evaluate_and_save()

    def _run_out(self) -> None:
        """Ends a run whose rows can be had only once, and have been."""
        progress = self.progress
        was_saved = self.timetable.checkpoint_is_due(progress)
        self.timetable = replace(self.timetable, ended_at=progress.step)
        self.console.print(
            f"no more rows after step {progress.step} of {self.total_steps}: a generator gives its rows once; give a "
            "function that makes one, to go through them again"
        )
        if progress.logged_step < progress.step:
            self._log()
        if progress.evaluated_step < progress.step or not was_saved:
            self._evaluate_and_save()

    def _evaluate_and_save(self) -> None:
        score, is_best = None, False
        if self.timetable.evaluation_is_due(self.progress.step) and self.progress.evaluated_step < self.progress.step:
            self._pause()
            self._evaluate("last")
            score = rank_of(self.progress.evaluations["last"], self.run.training)
            is_best = self.progress.rank(self.run.training)
            self.stopwatch.start()
        if self.timetable.checkpoint_is_due(self.progress, is_best=is_best):
            self._pause()
            # Else weights that nothing but skipped steps have seen could drive the good ones out.
            if not jax.device_get(self.state.skips.in_a_row):
                self._save(score)
            self.stopwatch.start()

    def _pause(self) -> None:
        """Stops the clock, once the device has done what it was given."""
        jax.block_until_ready(self.state)
        self.progress.spend(self.stopwatch.stop())

    def _log(self) -> None:
        """Writes a line of metrics for the steps since the last one."""
        progress = self.progress
        is_over = self._collect()
        learning_rate = float(self.schedule(max(0, progress.step - progress.skipped - 1)))
        row = progress.line(self.batches.epochs_at(progress.step), learning_rate)
        row["compilations"] = self.train_step.compilations
        if (peaks := hardware()) is not None:
            trainable, full = self.job.table.trainable, self.run.peft.full_finetuning
            tokens, attended = int(progress.window["tokens"]), progress.window["attended"]
            flops = step_flops(self.job.config, trainable, full, tokens, attended)
            row["mfu"] = flops / progress.window_seconds / (peaks.flops * self.job.devices.mesh.size)
        progress.close_window()
        if self.run.training.logging_strategy != "no" or self.timetable.line_is_due(progress.step):
            self._write(row)
        if is_over:
            limit = self.run.training.max_skipped_steps
            self._stop(
                f"the loss or its gradient is not finite, more than training.max_skipped_steps {limit} times in a row"
            )

    def _collect(self) -> bool:
        """Takes the sums since the last line from the device; whether it skipped too many steps in a row."""
        is_over = self._look_after_skips()
        self.progress.collect(jax.device_get(self.state.window))
        self._pause()
        self.stopwatch.start()
        self.state = replace(self.state, window=self.job.devices.replicate(Window.empty()))
        return is_over

    def _write(self, row: Row) -> None:
        with together():
            self.files.log.write(row)
        self.progress.rows += 1
        self.console.figures(row, self.total_steps)

    def _evaluate(self, name: str) -> None:
        """Writes a line of figures and remembers them under `name`."""
        progress, trainable = self.progress, self.state.trainable
        figures = self.evaluator.figures(trainable)
        if not math.isfinite(value(figures, "eval_loss")):
            self._stop(f"the evaluation's loss is not finite: {self.evaluator.why_not_finite(trainable)}")
        progress.evaluations[name], progress.evaluated_step = figures, progress.step
        numbers = {key: found for key, found in figures.items() if isinstance(found, float)}
        self._write({"step": progress.step, "epoch": self.batches.epochs_at(progress.step), **numbers})

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
        raise endings.not_finite(self.run, self.job, self.files, self.state, self.progress.step, why)

    # Checkpoints.

    def _save(self, score: float | None) -> None:
        """Saves everything that the rest of the run depends on; `score` is that of an evaluation just made."""
        self.progress.data = self.batches.get_state()
        with together():
            self.files.log.sync()
        beside = self.adapter.beside(self.state.trainable)
        self.files.open_checkpoints().save(self.progress.step, self.state, asdict(self.progress), score, beside)

    def _restore(self) -> bool:
        try:
            if (found := self.files.restore(self.state)) is None:
                return False
            self.state, saved = found
            self.progress = Progress(**saved)
            self.batches.set_state(self.progress.data)
        except InputError:
            self.files.give_up()
            raise
        self.files.set_aside_later()
        self.console.print(f"resuming at step {self.progress.step} of {self.total_steps}")
        self.profiler.go_on_from(self.progress.step)
        return True
