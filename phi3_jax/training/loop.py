"""A whole training run, from a configuration to an adapter, its results and a report."""

from dataclasses import replace

import jax

from phi3_jax.config.run import RunConfig
from phi3_jax.data.memory import GivenRows, GivenSets, with_given_rows
from phi3_jax.parallel.distributed import check_agreement, is_main, together
from phi3_jax.parallel.mesh import device_line
from phi3_jax.peft.continued import as_trained, open_run_base
from phi3_jax.system.compat_xla import is_out_of_memory
from phi3_jax.system.errors import InputError
from phi3_jax.system.files import StorageError
from phi3_jax.system.telling import at_verbosity
from phi3_jax.system.text import shown
from phi3_jax.training.checks import check_output_folder, check_settings
from phi3_jax.training.console import RunConsole
from phi3_jax.training.job import load_job
from phi3_jax.training.preemption import StopSignals
from phi3_jax.training.profile import tell_of_memory
from phi3_jax.training.push import RunPush
from phi3_jax.training.trainer import Results, Trainer


def train(run: RunConfig, *, train_dataset: GivenRows | None = None, eval_dataset: GivenSets | None = None) -> Results:
    """Fine-tunes as `run` says; writes config.yaml, metrics.jsonl, checkpoints/, adapter/ (or model/),
    the result files and report.html under `training.output_dir`.

    On several hosts every one of them calls this (`parallel.distributed.initialize` first), and the
    first one writes, to storage that they share.

    SIGTERM and SIGINT stop it after the step, or the batch of an evaluation, that it is at: a checkpoint is
    saved, and `SystemExit` of status 143 raised, or `KeyboardInterrupt`.

    Args:
        run: everything about it: model, adapter, data, training.
        train_dataset: rows in memory, in place of `data.train`: a `datasets.Dataset` or `IterableDataset`,
            dictionaries in a list or from a generator, or a function that makes such. To resume, give the same again.
        eval_dataset: the same for evaluation, in place of `data.eval`; or several of them by name.

    Returns:
        What all_results.json holds: `train_loss`, and with an evaluation set `eval_loss`, `eval_perplexity`,
        `eval_token_accuracy` and, where rows were answered, `exact_match`.

    Raises:
        InputError: for wrong settings, data or checkpoints, before anything is written.
        PushError: where `training.push_to_hub` fails at the end; everything is written by then.
        StorageError: where a disk takes no more; the weights are then in `training.fallback_dir`, where that is given.
        FloatingPointError: where more than `training.max_skipped_steps` steps in a row had a loss or gradient that is
            not finite, or an evaluation has such a loss; the last good adapter is saved before.

    Example:
        Two steps on four rows, from the small base that the package brings along (some seconds, most of them for
        compiling):

        >>> import contextlib, io, tempfile
        >>> from pathlib import Path
        >>> import phi3_jax as p3
        >>> folder = Path(tempfile.mkdtemp())
        >>> question, answer = {"role": "user", "content": "2 teas"}, {"role": "assistant", "content": "tea x2"}
        >>> run = RunConfig.from_dict({
        ...     "model": {"name_or_path": str(Path(p3.__file__).parent / "demo" / "base"), "dtype": "float32"},
        ...     "peft": {"r": 2, "target_modules": "all-linear"},
        ...     "data": {"max_length": 64},
        ...     "training": {"output_dir": str(folder / "out"), "max_steps": 2, "save_strategy": "no"},
        ...     "logging": {"tensorboard": False},
        ... })
        >>> with contextlib.redirect_stdout(io.StringIO()):
        ...     results = train(run, train_dataset=4 * [{"messages": [question, answer]}])
        >>> results["global_step"]
        2
        >>> sorted(path.name for path in (folder / "out" / "adapter").glob("adapter*"))
        ['adapter_config.json', 'adapter_model.safetensors']
    """
    if not isinstance(run, RunConfig):
        raise InputError(f"train takes a RunConfig, not {shown(run)}; RunConfig.from_dict makes one of a dictionary")
    level = run.logging.verbosity
    with at_verbosity(None if level == "normal" else level):
        return _train(run, train_dataset, eval_dataset)


def _train(run: RunConfig, train_dataset: GivenRows | None, eval_dataset: GivenSets | None) -> Results:
    with together():
        run = replace(run, data=with_given_rows(run.data, train_dataset, eval_dataset))
    with together():
        check_settings(run)
    with together():
        # The settings of an adapter that is continued are known once it is open; else the folder is looked at first.
        base = None if run.peft.init_from is None else open_run_base(run)
        run, notices = (run, []) if base is None else as_trained(run, base)
    check_agreement({"configuration": run.to_yaml()})
    with together():
        check_output_folder(run)
    console = RunConsole(progress=False)
    for line in (device_line(), *notices):
        console.print(line)
    with together():
        # Before a model is loaded: a wrong id, token or network shows at once.
        target = run.training.push_target
        push = None if target is None or not is_main() else RunPush(run.training, target, console.print)
    job = load_job(run, base, train=train_dataset, eval=eval_dataset, compiles=True)
    with job.devices.in_use(), StopSignals() as signals:
        trainer = Trainer(run, job, signals, push)
        try:
            return trainer.run_all()
        except StorageError as error:
            raise StorageError(f"{error}; {trainer.rescue()}") from error
        except jax.errors.JaxRuntimeError as error:
            if is_out_of_memory(error):
                tell_of_memory(trainer.files.path, console.print)
            raise
        finally:
            trainer.close()
