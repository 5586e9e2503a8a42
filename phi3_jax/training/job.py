"""Everything that a run works on, loaded and checked before the first byte is written."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import PRNGKeyArray

from phi3_jax.config import Phi3Config
from phi3_jax.data import prepare_data
from phi3_jax.hf.hub import load_tokenizer, resolve_checkpoint
from phi3_jax.lora import Lora, ParameterTable, parameter_table, partition, trainable_mask
from phi3_jax.model import Phi3ForCausalLM
from phi3_jax.run_config import RunConfig
from phi3_jax.training.evaluation import Prompt, choose_prompts, end_token_ids
from phi3_jax.training.start import load_model_and_lora
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
    lora_key, step_key = jax.random.split(jax.random.key(run.training.seed))
    model, lora = load_model_and_lora(run, folder, data.train, lora_key)
    full = run.peft.full_finetuning
    prompts = _prompts(run, data, model.config.max_position_embeddings)
    end_ids = end_token_ids(tokenizer, model.config)
    pad_id = next((i for i in (model.config.pad_token_id, tokenizer.pad_token_id) if i is not None), 0)
    graph, state = nnx.split(model)
    params = {"model": state, "lora": lora}
    freeze_A = run.training.optim == "lorafa"
    trainable, frozen = partition(params, trainable_mask(state, lora, full_finetuning=full, freeze_A=freeze_A))
    table = parameter_table(model, lora, freeze_A=freeze_A)
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


def _prompts(run: RunConfig, data: Any, positions: int) -> list[Prompt]:
    if data.eval is None or run.training.eval_strategy == "no":
        return []
    longest = positions - run.training.eval_max_new_tokens
    return choose_prompts(data.eval.prompts, run.training.eval_generations, longest)
