"""Everything that a run works on, loaded and checked before the first byte is written."""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import PRNGKeyArray

from phi3_jax.config.model import Phi3Config
from phi3_jax.config.run import RunConfig
from phi3_jax.data.memory import GivenRows, GivenSets
from phi3_jax.data.run_data import RunData, load_data
from phi3_jax.data.tokenizer import Tokenizer
from phi3_jax.generation import end_token_ids, padding_id
from phi3_jax.lora import Lora, ParameterTable, parameter_table, partition, trainable_mask
from phi3_jax.model import Phi3ForCausalLM
from phi3_jax.parallel.devices import Devices
from phi3_jax.parallel.layout import shardings
from phi3_jax.parallel.mesh import make_mesh
from phi3_jax.peft.continued import as_trained, open_run_base
from phi3_jax.peft.tokenizer import BaseOfAdapters
from phi3_jax.training.checks import check_batch, check_length, check_mesh
from phi3_jax.training.evaluation import Prompt, choose_prompts
from phi3_jax.training.start import load_model_and_lora
from phi3_jax.training.step import Params, TrainState, model_and_lora


@dataclass(frozen=True)
class Split:
    """A model and its adapter by what trains: arrays, or shapes in place of arrays.

    Attributes:
        graph: the model without its arrays.
        dtype: what it computes in.
        trainable: the parameters that train.
        frozen: those that do not.
        table: what trains, for people.
    """

    graph: nnx.GraphDef[Phi3ForCausalLM]
    dtype: jnp.dtype
    trainable: Params
    frozen: Params
    table: ParameterTable


def split_parameters(
    run: RunConfig, model: Phi3ForCausalLM, lora: Lora | None, place: Callable[[Params], Params]
) -> Split:
    """Splits the parameters as `run` says.

    Args:
        run: whose `peft` and `training` say what trains.
        model: the base.
        lora: the adapter, None for full fine-tuning.
        place: lays the parameters out over the devices.
    """
    graph, state = nnx.split(model)
    freeze_A = run.training.optim == "lorafa"
    mask = trainable_mask(state, lora, full_finetuning=run.peft.full_finetuning, freeze_A=freeze_A)
    trainable, frozen = partition(place({"model": state, "lora": lora}), mask)
    table = parameter_table(model, lora, freeze_A=freeze_A)
    return Split(graph, jnp.dtype(run.model.dtype), trainable, frozen, table)


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
    """

    tokenizer: Tokenizer
    data: RunData
    prompts: list[Prompt]
    end_ids: tuple[int, ...]
    pad_id: int
    revision: str | None


def load_job(
    run: RunConfig, base: BaseOfAdapters | None = None, *, train: GivenRows | None = None, eval: GivenSets | None = None
) -> RunJob:
    """Loads checkpoint and data.

    Args:
        run: says what.
        base: its checkpoint, where that is open already.
        train: the training rows, where they are in memory.
        eval: the evaluation rows, where they are, or sets of them by name.

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
    lora_key, step_key = jax.random.split(jax.random.key(run.training.seed))
    model, lora = load_model_and_lora(run, checkpoint, data.train, lora_key, devices.mesh)
    return RunJob(
        **vars(make_job(run, model, lora, devices, step_key)),
        tokenizer=tokenizer,
        data=data,
        prompts=_prompts(run, data, model.config.max_position_embeddings),
        end_ids=end_token_ids(tokenizer, model.config),
        pad_id=padding_id(tokenizer, model.config),
        revision=checkpoint.revision,
    )


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
