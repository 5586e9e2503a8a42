"""Everything that a run works on, loaded and checked before the first byte is written."""

from dataclasses import dataclass

import jax
import optax
from jaxtyping import PRNGKeyArray

from phi3_jax.config.model import Phi3Config
from phi3_jax.config.run import RunConfig
from phi3_jax.data.memory import GivenRows, GivenSets
from phi3_jax.data.pipeline import Batches
from phi3_jax.data.run_data import RunData, load_data, run_batches
from phi3_jax.data.streaming import StreamedBatches
from phi3_jax.data.tokenizer import Tokenizer
from phi3_jax.generation import end_token_ids, padding_id
from phi3_jax.lora import Lora
from phi3_jax.model import Phi3ForCausalLM
from phi3_jax.optim.schedule import make_schedule
from phi3_jax.parallel.devices import Devices
from phi3_jax.parallel.distributed import check_agreement
from phi3_jax.parallel.layout import shardings
from phi3_jax.parallel.mesh import make_mesh
from phi3_jax.peft.continued import as_trained, open_run_base
from phi3_jax.peft.tokenizer import BaseOfAdapters
from phi3_jax.training.ahead import StepAhead, step_ahead
from phi3_jax.training.checks import check_batch, check_length, check_mesh
from phi3_jax.training.evaluation import Prompt, choose_prompts
from phi3_jax.training.split import Split, split_parameters
from phi3_jax.training.start import check_start, load_model_and_lora
from phi3_jax.training.step import Params, TrainState, model_and_lora
from phi3_jax.training.timetable import Timetable


@dataclass(frozen=True)
class Job(Split):
    """What steps work on; the first one takes `trainable` with it.

    Attributes:
        config: the model's.
        devices: what shares the work.
        step_key: what the steps' randomness is drawn from.
    """

    config: Phi3Config
    devices: Devices
    step_key: PRNGKeyArray

    def first_state(self, tx: optax.GradientTransformation) -> TrainState:
        """The state before the first step, which takes `trainable` with it."""

        def create(trainable: Params, key: PRNGKeyArray) -> TrainState:
            return TrainState.create(trainable, tx, key)

        key = self.devices.replicate(self.step_key)
        layout = shardings(jax.eval_shape(create, self.trainable, key), self.devices.mesh)
        first: TrainState = jax.jit(create, out_shardings=layout, donate_argnums=0)(self.trainable, key)
        return first

    def model_and_lora(self, trainable: Params) -> tuple[Phi3ForCausalLM, Lora | None]:
        """The model and the adapter, with these parameters in place of those it started with."""
        return model_and_lora(self.graph, trainable, self.frozen, self.dtype)


@dataclass(frozen=True)
class RunJob(Job):
    """What a run works on.

    Attributes:
        tokenizer: the checkpoint's.
        data: the rows.
        prompts: the evaluation rows to answer.
        end_ids: the tokens that end an answer.
        pad_id: what fills rows.
        revision: that of the checkpoint, None for a folder.
        batches: the rows in batches, from the first step on.
        ahead: the train step that is being compiled already; None where the first step compiles it.
    """

    tokenizer: Tokenizer
    data: RunData
    prompts: list[Prompt]
    end_ids: tuple[int, ...]
    pad_id: int
    revision: str | None
    batches: Batches | StreamedBatches
    ahead: StepAhead | None


def load_job(
    run: RunConfig,
    base: BaseOfAdapters | None = None,
    *,
    train: GivenRows | None = None,
    eval: GivenSets | None = None,
    compiles: bool = False,
) -> RunJob:
    """Loads checkpoint and data.

    Args:
        run: says what.
        base: its checkpoint, where that is open already.
        train: the training rows, where they are in memory.
        eval: the evaluation rows, where they are, or sets of them by name.
        compiles: whether the train step is compiled while the weights load.

    Raises:
        InputError: for whatever is wrong with them.
    """
    checkpoint = open_run_base(run) if base is None else base
    if base is None:
        run, _ = as_trained(run, checkpoint)
    config = checkpoint.config
    devices = job_devices(run, config)
    tokenizer = checkpoint.tokenizer
    # The data first: what is wrong with it shows in seconds, and a large model takes minutes.
    data = load_data(run.data, tokenizer, seed=run.training.seed, train=train, eval=eval, table_rows=config.vocab_size)
    check_length(data.longest, config)
    pad_id = padding_id(tokenizer, config)
    batches = _batches(run, data, devices, pad_id)
    try:
        total_steps = Timetable(run.training, batches.steps_per_epoch, evaluates=False).total_steps
        make_schedule(run.training, total_steps)  # what is wrong with it shows before the weights are read, too
        check_start(run, checkpoint)
        length = _row_length(run, batches)
        ahead = None
        if compiles:
            adapter = next(iter(checkpoint.adapters), None)
            ahead = step_ahead(run, config, devices, total_steps=total_steps, length=length, adapter=adapter)
        lora_key, step_key = jax.random.split(jax.random.key(run.training.seed))
        model, lora = load_model_and_lora(run, checkpoint, data.train, lora_key, devices.mesh)
    except BaseException:
        batches.close()
        raise
    return RunJob(
        **vars(make_job(run, model, lora, devices, step_key)),
        tokenizer=tokenizer,
        data=data,
        prompts=_prompts(run, data, model.config.max_position_embeddings),
        end_ids=end_token_ids(tokenizer, model.config),
        pad_id=pad_id,
        revision=checkpoint.revision,
        batches=batches,
        ahead=ahead,
    )


def _batches(run: RunConfig, data: RunData, devices: Devices, pad_id: int) -> Batches | StreamedBatches:
    training = run.training
    size = devices.batch_size(training.per_device_train_batch_size)
    batches = run_batches(
        data.train,
        run.data,
        batch_size=size,
        part=devices.rows_here(size),
        accumulation=training.gradient_accumulation_steps,
        epochs=None,  # as many as it takes; the loop counts steps
        seed=training.order_seed,
        pad_id=pad_id,
        group_by_length=training.group_by_length,
        drop_last=training.dataloader_drop_last,
    )
    check_agreement({"training rows": batches.fingerprint})
    return batches


def _row_length(run: RunConfig, batches: Batches | StreamedBatches) -> int | None:
    """Positions of the first step's rows; None where they are not to be had without reading them."""
    if run.data.packing:
        return run.data.limit
    return batches.batch_of(0)["input_ids"].shape[-1] if isinstance(batches, Batches) else None


def make_job(
    run: RunConfig, model: Phi3ForCausalLM, lora: Lora | None, devices: Devices, step_key: PRNGKeyArray
) -> Job:
    """Splits the parameters as `run` says, and spreads them over the devices."""
    split = split_parameters(run, model, lora, devices.spread)
    return Job(**vars(split), config=model.config, devices=devices, step_key=step_key)


def job_devices(run: RunConfig, config: Phi3Config) -> Devices:
    """Those that `run.parallel` asks for.

    Raises:
        InputError: where devices, model and rows cannot be cut so.
    """
    mesh = make_mesh(run.parallel.sizes)
    check_mesh(run, config, mesh.shape)
    check_batch(run)
    return Devices(mesh)


def _prompts(run: RunConfig, data: RunData, positions: int) -> list[Prompt]:
    if not data.eval_sets or run.training.eval_strategy == "no":
        return []
    longest = positions - run.training.eval_max_new_tokens
    return choose_prompts([rows.prompts for rows in data.eval_sets.values()], run.training.eval_generations, longest)
