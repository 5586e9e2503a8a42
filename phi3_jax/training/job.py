"""Everything that a run works on, loaded and checked before the first byte is written."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import PRNGKeyArray

from phi3_jax.config import Phi3Config
from phi3_jax.data import prepare_data
from phi3_jax.errors import InputError
from phi3_jax.hf.checkpoint import load_model
from phi3_jax.hf.hub import load_tokenizer, resolve_checkpoint
from phi3_jax.hf.peft import load_adapter
from phi3_jax.lora import Lora, ParameterTable, init_lora, parameter_table, partition, trainable_mask
from phi3_jax.model import Phi3ForCausalLM
from phi3_jax.run_config import RunConfig
from phi3_jax.training.evaluation import Prompt, choose_prompts, end_token_ids
from phi3_jax.training.step import Params, model_and_lora


@dataclass
class Job:
    """A run's inputs.

    **Fields**: `graph`, the model without its arrays; `dtype`, what it computes in; `trainable` and
    `frozen`, its parameters and the adapter's, parted (the first step takes the trainable ones with
    it); `table`, what trains; `prompts`, the evaluation rows to answer, up to one of `end_ids`;
    `pad_id`, what fills rows; `step_key`, what the steps' randomness is drawn from.
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

    def model_and_lora(self, trainable: Params) -> tuple[Phi3ForCausalLM, Lora | None]:
        """The model and the adapter, with these parameters in place of those it started with."""
        return model_and_lora(self.graph, trainable, self.frozen, self.dtype)


def load_job(run: RunConfig) -> Job:
    """Loads checkpoint and data. Raises `InputError` for whatever is wrong with them."""
    section = run.model
    hub: dict[str, Any] = {"cache_dir": section.cache_dir, "local_files_only": section.local_files_only}
    folder = resolve_checkpoint(section.name_or_path, revision=section.revision, **hub)
    tokenizer = load_tokenizer(folder)
    # The data first: what is wrong with it shows in seconds, and a large model takes minutes.
    data = prepare_data(run.data, tokenizer, seed=run.training.seed)
    model = _load_base(run, folder)
    lora_key, step_key = jax.random.split(jax.random.key(run.training.seed))
    lora = _load_lora(run, model, lora_key)
    full = run.peft.full_finetuning
    table = parameter_table(model, lora)
    prompts = _prompts(run, data, model.config.max_position_embeddings)
    end_ids = end_token_ids(tokenizer, model.config)
    pad_id = next((i for i in (model.config.pad_token_id, tokenizer.pad_token_id) if i is not None), 0)
    graph, state = nnx.split(model)
    params = {"model": state, "lora": lora}
    trainable, frozen = partition(params, trainable_mask(state, lora, full_finetuning=full))
    return Job(
        config=model.config,
        tokenizer=tokenizer,
        data=data,
        graph=graph,
        dtype=jnp.dtype(section.dtype),
        trainable=trainable,
        frozen=frozen,
        table=table,
        prompts=prompts,
        end_ids=end_ids,
        pad_id=pad_id,
        step_key=step_key,
    )


def _load_base(run: RunConfig, folder: Path) -> Phi3ForCausalLM:
    # Weights that train are kept in float32 and rounded to model.dtype for every step's arithmetic:
    # in bfloat16 an update of less than 1/256 of a weight would be lost.
    dtype = jnp.float32 if run.peft.full_finetuning else jnp.dtype(run.model.dtype)
    model = load_model(folder, dtype=dtype)
    if model.config.attention_dropout > 0:
        raise InputError(
            f"{folder}: config.json has attention_dropout {model.config.attention_dropout}, which is not "
            "supported in training; set it to 0"
        )
    return model


def _load_lora(run: RunConfig, model: Phi3ForCausalLM, key: PRNGKeyArray) -> Lora | None:
    if run.peft.full_finetuning:
        return None
    if run.peft.init_from is not None:
        return load_adapter(
            run.peft.init_from, model, cache_dir=run.model.cache_dir, local_files_only=run.model.local_files_only
        )
    return init_lora(model, run.peft, key)


def _prompts(run: RunConfig, data: Any, positions: int) -> list[Prompt]:
    if data.eval is None or run.training.eval_strategy == "no":
        return []
    longest = positions - run.training.eval_max_new_tokens
    return choose_prompts(data.eval.prompts, run.training.eval_generations, longest)
