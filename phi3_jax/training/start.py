"""What a run starts from: the base, quantised or not, and the adapter by its initialiser."""

import warnings
from collections.abc import Callable, Hashable
from functools import partial
from itertools import islice

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import PRNGKeyArray

from phi3_jax.config.lora import LoraConfig
from phi3_jax.config.run import RunConfig
from phi3_jax.data.rows import TokenizedRows
from phi3_jax.data.run_data import run_batches
from phi3_jax.data.streaming import StreamedRows
from phi3_jax.hf.checkpoint import Checkpoint
from phi3_jax.lora import LoftqQuantizer, Lora, config_targets, eva_init, init_lora
from phi3_jax.model import Phi3ForCausalLM
from phi3_jax.parallel.layout import weight_sharding
from phi3_jax.parallel.sharding import replicated
from phi3_jax.peft.tokenizer import BaseOfAdapters
from phi3_jax.quant import Quantizer
from phi3_jax.system.errors import InputError
from phi3_jax.system.telling import taking

# PEFT goes over the data until all components have converged, however long that takes.
EVA_EPOCHS = 10


def load_model_and_lora(
    run: RunConfig, checkpoint: BaseOfAdapters, rows: TokenizedRows | StreamedRows, key: PRNGKeyArray, mesh: Mesh
) -> tuple[Phi3ForCausalLM, Lora | None]:
    """The checkpoint's base, and the adapter to train: fresh, or `peft.init_from`'s.

    Args:
        run: Says what is trained, and with which initialiser.
        checkpoint: The base's, with the adapter to continue.
        rows: To train on, which some initialisers look at.
        key: What is drawn from.
        mesh: The devices that share the base's weights.

    Raises:
        InputError: For what is wrong with the checkpoint, the adapter or the settings of `peft`.
    """
    check_start(run, checkpoint)
    if run.peft.full_finetuning:
        return _load_whole(run, checkpoint, mesh), None
    if checkpoint.adapters:
        (adapter,) = checkpoint.adapters
        # Before the weights are read, which may take minutes.
        lora = adapter.load(checkpoint.shapes, checkpoint, lora_dropout=run.peft.lora_dropout)
        return _load_base(run, checkpoint, mesh), lora
    if run.peft.init_lora_weights == "loftq":
        return _load_loftq(run, checkpoint, mesh)
    model = _load_base(run, checkpoint, mesh)
    with taking(f"initialising the adapter (init_lora_weights {run.peft.init_lora_weights})"):
        if run.peft.init_lora_weights == "eva":
            return model, _eva_initialiser(run, rows)(model, run.peft, key)
        return model, fresh_lora(model, run.peft, key, mesh)


def check_start(run: RunConfig, checkpoint: BaseOfAdapters) -> None:
    """Looks at what can be seen before the weights are read, which may take minutes.

    Raises:
        InputError: As `load_model_and_lora`.
    """
    checkpoint.config.check_trainable(f"{checkpoint.folder}: config.json")
    if not run.peft.full_finetuning and not checkpoint.adapters:
        config_targets(checkpoint.shapes, run.peft)  # every target is looked up
    if run.peft.init_lora_weights in ("eva", "loftq") and jax.process_count() > 1:
        raise InputError(
            f"peft.init_lora_weights is {run.peft.init_lora_weights}, which is computed on one host, and there are "
            f"{jax.process_count()}; train a step on one, and give its adapter as peft.init_from here"
        )
    _ = checkpoint.weights  # the headers of its files


def fresh_lora(model: Phi3ForCausalLM, config: LoraConfig, key: PRNGKeyArray, mesh: Mesh) -> Lora:
    """`init_lora`; on several hosts in one program that they all run, since some initialisers see the weights."""
    if jax.process_count() == 1:
        return init_lora(model, config, key)
    graph, state = nnx.split(model)
    bits = np.asarray(jax.random.key_data(key))

    def draw(state: nnx.State[Hashable, object]) -> Lora:
        return init_lora(nnx.merge(graph, state), config, jax.random.wrap_key_data(jnp.asarray(bits)))

    with jax.set_mesh(mesh):
        lora: Lora = jax.jit(draw, out_shardings=replicated(mesh))(state)
    return lora


def _load_base(
    run: RunConfig, checkpoint: Checkpoint, mesh: Mesh, quantizer: Quantizer | None = None
) -> Phi3ForCausalLM:
    return checkpoint.load_model(
        attention=run.model.attention,
        shardings=partial(weight_sharding, mesh=mesh),
        # So that every device has its heads of q, k and v each.
        split=mesh.shape["tensor"] > 1,
        dtype=run.model.dtype,
        quantization=run.model.quantization,
        double_quant=run.model.double_quant,
        quantizer=quantizer,
    )


def _load_whole(run: RunConfig, checkpoint: Checkpoint, mesh: Mesh) -> Phi3ForCausalLM:
    checkpoint.check_unquantized("and peft.full_finetuning trains them, which rounded ones cannot")
    # Weights that train are kept in float32 and rounded to model.dtype for every step's arithmetic:
    # in bfloat16 an update of less than 1/256 of a weight would be lost.
    shardings = partial(weight_sharding, mesh=mesh)
    return checkpoint.load_model(dtype=jnp.float32, attention=run.model.attention, shardings=shardings)


def _load_loftq(run: RunConfig, checkpoint: Checkpoint, mesh: Mesh) -> tuple[Phi3ForCausalLM, Lora]:
    checkpoint.check_unquantized("and peft.init_lora_weights loftq is computed from what quantising loses")
    kind = str(run.model.quantization)
    quantizer = LoftqQuantizer(checkpoint.shapes, run.peft, kind, double_quant=run.model.double_quant)
    model = _load_base(run, checkpoint, mesh, quantizer)
    return model, quantizer.lora(model)


def _eva_initialiser(run: RunConfig, rows: TokenizedRows | StreamedRows) -> Callable[..., Lora]:
    """`eva_init` on the run's own batches, as `init_lora`."""
    if isinstance(rows, StreamedRows) and rows.once:
        raise InputError(
            f"peft.init_lora_weights is eva, which goes through the rows of {', '.join(rows.names)} beforehand, but "
            "they can be had only once; give a function that makes the generator"
        )

    def initialise(model: Phi3ForCausalLM, config: LoraConfig, key: PRNGKeyArray) -> Lora:
        batches = run_batches(
            rows,
            run.data,
            batch_size=run.training.per_device_train_batch_size,
            accumulation=1,
            epochs=EVA_EPOCHS,
            seed=run.training.order_seed,
            pad_id=0,  # padding does not count
        )
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            # As many as there will be, of a stream that may have no end.
            first = islice(batches, run.training.max_steps) if run.data.streaming else batches
            lora = eva_init(model, config, (jax.tree.map(lambda x: x[0], batch) for batch in first), key)
        batches.close()
        for warning in caught:  # on the console, where the command line shows no warnings
            print(warning.message)
        return lora

    return initialise
