"""A model and its adapter by what trains and what does not."""

from collections.abc import Callable
from dataclasses import dataclass

import jax.numpy as jnp
from flax import nnx

from phi3_jax.config.run import RunConfig
from phi3_jax.lora import Lora, ParameterTable, parameter_table, partition, trainable_mask
from phi3_jax.model import Phi3ForCausalLM
from phi3_jax.training.step import Params


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
