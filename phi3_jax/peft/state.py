"""Adapters out of the training state of checkpoints that hold no adapter's files: what version 0.1.0 wrote."""

from collections.abc import Mapping
from pathlib import Path

import jax
from flax import nnx

from phi3_jax.config.lora import LoraConfig
from phi3_jax.config.parse import read_yaml
from phi3_jax.config.run import RunConfig, parse_run_config
from phi3_jax.lora.fresh import init_lora
from phi3_jax.lora.tree import Lora
from phi3_jax.model import Phi3ForCausalLM
from phi3_jax.peft.folder import RUN_CONFIG, STATE
from phi3_jax.system.compat_orbax import load_arrays
from phi3_jax.system.errors import InputError
from phi3_jax.system.text import first_line

# The arrays of the adapter, behind which come the fields of a `Lora`.
PREFIX = "trainable.lora."
ADVICE = "resume the run for a step, whose checkpoint will be one"


def state_config(checkpoint: Path) -> LoraConfig:
    """What the run that wrote the checkpoint was told about its adapter, and of which base.

    Raises:
        InputError: Where the run's config.yaml is not there, or the run trained none that its state alone tells.
    """
    run = _run(checkpoint)
    peft = run.peft
    why = None
    if peft.full_finetuning:
        why = "the run trained the whole model and no adapter; its end writes a model, and the way there is to resume"
    elif peft.init_from is not None:
        why = f"it began with {peft.init_from} (peft.init_from), and holds nothing of that adapter's settings; {ADVICE}"
    elif peft.is_residual or peft.init_lora_weights in ("eva", "loftq"):
        why = f"it began with peft.init_lora_weights {peft.init_lora_weights}, which is not in its state; {ADVICE}"
    elif run.training.optim == "lorafa":
        why = f"training.optim is lorafa, so that half of the adapter is not in its state; {ADVICE}"
    if why is not None:
        raise InputError(f"{checkpoint}: is the state of a run without an adapter's files, and cannot be one: {why}")
    names = {name: getattr(peft, name) for name in LoraConfig.__dataclass_fields__}
    names["base_model_name_or_path"] = peft.base_model_name_or_path or run.model.name_or_path
    names["revision"] = peft.revision or run.model.revision
    return LoraConfig(**names)


def load_state(checkpoint: Path, config: LoraConfig, model: Phi3ForCausalLM) -> Lora:
    """The adapter at that step.

    Args:
        checkpoint: Its folder.
        config: What `state_config` says.
        model: The base; shapes in place of arrays are enough.

    Raises:
        InputError: Where the state is of another model.
    """
    graph, weights = nnx.split(model)
    like: Lora = jax.eval_shape(
        lambda weights: init_lora(nnx.merge(graph, weights), config, jax.random.key(0)), weights
    )
    paths, structure = jax.tree_util.tree_flatten_with_path(like)
    names = [f"{PREFIX}{jax.tree_util.keystr(path, simple=True, separator='.')}" for path, _ in paths]
    wanted = {name: leaf for name, (_, leaf) in zip(names, paths, strict=True)}
    try:
        arrays: Mapping[str, jax.Array] = load_arrays(checkpoint, STATE, wanted)
    except (ValueError, OSError) as error:
        raise InputError(
            f"{checkpoint}: its state does not fit the model and the run's {RUN_CONFIG} ({first_line(error)}); "
            "give the base that it was trained on"
        ) from error
    lora: Lora = jax.tree.unflatten(structure, [arrays[name] for name in names])
    return lora


def _run(checkpoint: Path) -> RunConfig:
    file = checkpoint.parent.parent / RUN_CONFIG
    if not file.is_file():
        raise InputError(
            f"{checkpoint}: holds the state of training without an adapter's files, which only {file} could tell how "
            "to read, and that is not there; keep it in its run's folder"
        )
    return parse_run_config(read_yaml(file))[0]
