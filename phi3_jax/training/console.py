"""What a run shows on the console: a progress bar, or plain lines where nobody watches."""

import sys

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from phi3_jax.report.forms import figure_words, form_of, set_and_figure, words
from phi3_jax.system.secrets import redact
from phi3_jax.system.telling import is_speaker, verbosity
from phi3_jax.system.text import printable
from phi3_jax.training.evaluation import EvalFigures
from phi3_jax.training.metrics import Row


class RunConsole:
    """Shows steps done, loss, tokens/s and time left; between the lines that the run prints.

    A quiet process shows warnings and results alone.
    """

    def __init__(self, *, progress: bool):
        quiet = verbosity() == "quiet" or not is_speaker()
        # Tables and paths are printed as they are, whatever brackets are in them.
        self._console = Console(highlight=False, markup=False, soft_wrap=True, quiet=quiet)
        self._results = Console(highlight=False, markup=False, soft_wrap=True) if quiet else self._console
        self._bar = Bar(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self._console,
            disable=not (progress and self._console.is_terminal),
        )
        self._lines = progress and not self._console.is_terminal
        self._task = self._bar.add_task("training", total=None, figures="")

    def print(self, text: str) -> None:
        """A line; of a quiet run's lines warnings alone, on standard error."""
        if not self._console.quiet:
            self._console.print(printable(redact(text)))
        elif text.startswith("warning:") and is_speaker():
            print(printable(redact(text)), file=sys.stderr)

    def result(self, text: str) -> None:
        """A line that a quiet run has, too."""
        if is_speaker():
            self._results.print(printable(redact(text)))

    def start(self, step: int, total: int) -> None:
        self._bar.update(self._task, completed=step, total=total)
        self._bar.start()

    def advance(self, step: int) -> None:
        self._bar.update(self._task, completed=step)

    def figures(self, row: Row, total: int) -> None:
        """Shows a row of metrics: in the bar, or as a line of its own."""
        if "eval_loss" in row:
            for of in dict.fromkeys(set_and_figure(name)[0] for name in row if name.startswith("eval_")):
                prefix = f"eval_{of}_" if of else "eval_"
                text = ", ".join(
                    f"{words(name)} {form_of(name).write(row[f'{prefix}{name}'])}"
                    for name in ("loss", "perplexity", "token_accuracy")
                )
                self.print(f"step {row['step']}/{total}  evaluation{f' of {of}' if of else ''}: {text}")
            return
        loss = f"loss {row['loss']:.4f}" if "loss" in row else "all steps skipped"
        text = f"{loss}  {row['tokens_per_second']:,.0f} tokens/s"
        self._bar.update(self._task, figures=text)
        if self._lines:
            self.print(f"step {row['step']}/{total}  {text}  lr {row['learning_rate']:.2e}")

    def before_and_after(self, before: EvalFigures, after: EvalFigures) -> None:
        """A line for each figure of the evaluation."""
        numbers = {name: value for name, value in before.items() if isinstance(value, float)}
        for name, value in after.items():
            if isinstance(value, float):  # the others are intervals
                old = f"{form_of(name).write(numbers[name])} before, " if name in numbers else ""
                self.result(f"{figure_words(name)}: {old}{form_of(name).write(value)} after")

    def stop(self) -> None:
        self._bar.stop()
