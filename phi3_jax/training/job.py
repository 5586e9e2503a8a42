"""Everything that a run works on, loaded and checked before the first byte is written."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import PRNGKeyArray

from phi3_jax.config.model import Phi3Config
from phi3_jax.config.run import RunConfig
from phi3_jax.data import prepare_data
from phi3_jax.generation import end_token_ids, padding_id
from phi3_jax.hf.checkpoint import Checkpoint
from phi3_jax.lora import Lora, ParameterTable, parameter_table, partition, trainable_mask
from phi3_jax.model import Phi3ForCausalLM
from phi3_jax.parallel.devices import Devices
from phi3_jax.parallel.layout import shardings
from phi3_jax.parallel.mesh import make_mesh
from phi3_jax.training.checks import check_length, check_mesh
from phi3_jax.training.evaluation import Prompt, choose_prompts
from phi3_jax.training.start import load_model_and_lora
from phi3_jax.training.step import Params, TrainState, model_and_lora


@dataclass
class Job:
    """A run's inputs.

    **Fields**: `graph`, the model without its arrays; `dtype`, what it computes in; `trainable` and
    `frozen`, its parameters and the adapter's, parted (the first step takes the trainable ones with
    it); `table`, what trains; `prompts`, the evaluation rows to answer, up to one of `end_ids`;
    `pad_id`, what fills rows; `step_key`, what the steps' randomness is drawn from;
    `devices`, what shares the work.
    """

    config: Phi3Config
    tokenizer: Any
    data: Any
    graph: Any
    dtype: Any
    trainable: Params
    frozen: Params
    table: ParameterTable
    prompts: list[Prompt]
    end_ids: tuple[int, ...]
    pad_id: int
    step_key: PRNGKeyArray
    devices: Devices
    revision: str | None = None

    def first_state(self, tx: optax.GradientTransformation) -> TrainState:
        """The state before the first step, which takes `trainable` with it."""

        def create(trainable: Params, key: PRNGKeyArray) -> TrainState:
            return TrainState.create(trainable, tx, key)

        key = self.devices.replicate(self.step_key)
        layout = shardings(jax.eval_shape(create, self.trainable, key), self.devices.mesh)
        return jax.jit(create, out_shardings=layout, donate_argnums=0)(self.trainable, key)

    def model_and_lora(self, trainable: Params) -> tuple[Phi3ForCausalLM, Lora | None]:
        """The model and the adapter, with these parameters in place of those it started with."""
        return model_and_lora(self.graph, trainable, self.frozen, self.dtype)


def load_job(run: RunConfig) -> Job:
    """Loads checkpoint and data. Raises `InputError` for whatever is wrong with them."""
    checkpoint = Checkpoint.open(run.model.name_or_path, run.model.hub)
    config = checkpoint.config
    devices = job_devices(run, config)
    tokenizer = checkpoint.tokenizer
    # The data first: what is wrong with it shows in seconds, and a large model takes minutes.
    data = prepare_data(run.data, tokenizer, seed=run.training.seed)
    check_length(int(data.train.lengths.max()), config)
    lora_key, step_key = jax.random.split(jax.random.key(run.training.seed))
    model, lora = load_model_and_lora(run, checkpoint, data.train, lora_key, devices.mesh)
    return make_job(
        run,
        model,
        lora,
        devices,
        step_key,
        tokenizer=tokenizer,
        data=data,
        prompts=_prompts(run, data, model.config.max_position_embeddings),
        end_ids=end_token_ids(tokenizer, model.config),
        pad_id=padding_id(tokenizer, model.config),
        revision=checkpoint.revision,
    )


def make_job(
    run: RunConfig,
    model: Phi3ForCausalLM,
    lora: Lora | None,
    devices: Devices,
    step_key: PRNGKeyArray,
    *,
    tokenizer: Any = None,
    data: Any = None,
    prompts: Sequence[Prompt] = (),
    end_ids: tuple[int, ...] = (),
    pad_id: int = 0,
    revision: str | None = None,
) -> Job:
    """Parts the parameters as `run` says and spreads them over the devices; the rest as the fields of `Job`."""
    graph, state = nnx.split(model)
    freeze_A = run.training.optim == "lorafa"
    mask = trainable_mask(state, lora, full_finetuning=run.peft.full_finetuning, freeze_A=freeze_A)
    trainable, frozen = partition(devices.spread({"model": state, "lora": lora}), mask)
    return Job(
        config=model.config,
        tokenizer=tokenizer,
        data=data,
        graph=graph,
        dtype=jnp.dtype(run.model.dtype),
        trainable=trainable,
        frozen=frozen,
        table=parameter_table(model, lora, freeze_A=freeze_A),
        prompts=list(prompts),
        end_ids=end_ids,
        pad_id=pad_id,
        step_key=step_key,
        devices=devices,
        revision=revision,
    )


def job_devices(run: RunConfig, config: Phi3Config) -> Devices:
    """Those that `run.parallel` asks for.

    Raises `InputError` where devices, model and rows cannot be cut so.
    """
    mesh = make_mesh(asdict(run.parallel))
    check_mesh(run, config, mesh.shape)
    return Devices(mesh)


def _prompts(run: RunConfig, data: Any, positions: int) -> list[Prompt]:
    if data.eval is None or run.training.eval_strategy == "no":
        return []
    longest = positions - run.training.eval_max_new_tokens
    return choose_prompts(data.eval.prompts, run.training.eval_generations, longest)
