"""What a step keeps in a device's memory: counted where it can be, estimated where a compiler decides."""

import math
from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
from jax.core import ShapedArray
from jax.sharding import AbstractMesh
from jaxtyping import PyTree

from phi3_jax.config.model import Phi3Config
from phi3_jax.config.run import RunConfig
from phi3_jax.model import attention
from phi3_jax.model.sequence import piece_count
from phi3_jax.objectives.cross_entropy import chunk_tokens
from phi3_jax.performance.topology import Topology, abstract_mesh
from phi3_jax.system.compat_xla import scans, stacked_outputs
from phi3_jax.training.abstract import AbstractStep, abstract_step
from phi3_jax.training.flops import matmul_parameters

# What going back through a layer takes, by what all of the layer's values do: as one gradient comes, a value
# goes, but for a few. Fitted to compiled steps, see docs/plan.md.
WORKING_SET = 1.1
LANES = 128  # of a TPU's registers: what an array's last axis is filled up to a multiple of
# How far an estimate was from the compiled step's memory, see docs/plan.md.
ESTIMATE_MARGIN = 0.15


@dataclass(frozen=True)
class Memory:
    """Bytes on each device.

    Attributes:
        weights: Of the base, trained ones too.
        adapter: Its parameters.
        optimizer: Its state.
        activations: Kept from the forward for the backward pass.
        temporaries: All else: gradients, a layer's and the loss's working set, gathered and dequantised weights, the
            last good adapter.
        host: Activations that wait in the host's memory, not part of `total`.
    """

    weights: int
    adapter: int
    optimizer: int
    activations: int
    temporaries: int
    host: int = 0

    @property
    def total(self) -> int:
        return self.weights + self.adapter + self.optimizer + self.activations + self.temporaries

    def by_kind(self) -> dict[str, int]:
        names = ("weights", "adapter", "optimizer", "activations", "temporaries")
        return {name: getattr(self, name) for name in names}

    def with_total(self, total: int) -> "Memory":
        """The same with temporaries that make the sum `total`, as a compiler counted it."""
        rest = total - (self.total - self.temporaries)
        # A compiler may keep less than was counted; then nothing is left for temporaries.
        return replace(self, activations=self.activations + min(0, rest), temporaries=max(0, rest))


class Estimator:
    """Estimates what runs of one model take on each device; nothing is compiled.

    Weights, adapter and optimizer are exact. Activations are what the traced forward pass hands to the
    backward pass. For temporaries the step is taken to be at its largest when it goes back through a
    layer, with all of that layer's values at hand, or at the loss's chunk of logits.
    """

    def __init__(self, config: Phi3Config):
        self.config = config
        self._traced: dict[str, float] = {}

    def __call__(self, run: RunConfig, topology: Topology) -> Memory:
        """Raises `InputError` where the mesh or the attention kernel is not for these devices or this model."""
        config, policy = self.config, run.training.remat
        mesh = abstract_mesh(run, topology)
        kind = attention_of(run, config, mesh)
        rows = run.training.per_device_train_batch_size
        tokens = rows * run.data.limit // mesh.shape["context"]
        kept = tokens * self._kept_per_token(run, policy, kind, topology)
        # On a CPU `none` does not keep everything either.
        all_of_it = run.changed({"training.chunk_mlp": "none"})
        everything = tokens * self._kept_per_token(all_of_it, "none", kind, replace(topology, platform="gpu"))
        layer = everything / config.num_hidden_layers
        step = abstract_step(run, config, mesh)
        if (pieces := _pieces(run, mesh)) > 1:
            layer = layer / pieces + tokens * _whole_rows(run, config, mesh, kind, topology)
        backward = WORKING_SET * layer + _pairs(run, config, mesh, kind) + _layer_weights(run, config, mesh)
        temporaries = max(backward, _loss(run, config, mesh)) + _gradients(step) + _bytes(step.state.good)
        return Memory(
            **state_bytes(step),
            # Offloaded inputs pass by, two layers' at a time.
            activations=round(2 * kept / config.num_hidden_layers if policy == "offload" else kept),
            temporaries=round(temporaries),
            host=round(kept) if policy == "offload" else 0,
        )

    def _kept_per_token(self, run: RunConfig, policy: str, kind: str, topology: Topology) -> float:
        """Bytes on a device for each of its tokens that the scan over the layers hands to the backward pass.

        Traced on a row that is as long as need be: only `xla` keeps what grows faster than the length.
        """
        context = abstract_mesh(run, topology).shape["context"]
        length = run.data.limit if kind == "xla" else 1024 * context
        # cuDNN's kernel can only be traced where it is, and splash takes a while; both keep what `chunked` does.
        kind = "chunked" if kind in ("cudnn", "splash") else kind
        traced = run.changed(
            {
                "model.attention": kind,
                "data.max_length": length,
                # Of what is cut nothing is kept, in however many pieces.
                "training.chunk_mlp": 2 if _pieces(run, abstract_mesh(run, topology)) > 1 else "none",
                "training.per_device_train_batch_size": 1,
                "training.gradient_accumulation_steps": 1,
                "training.gradient_checkpointing": policy != "none",
                "training.remat_policy": run.training.remat_policy if policy == "none" else policy,
                "parallel.data": 1,
                "parallel.fsdp": 1,
                "parallel.context": context,
            }
        )
        key = topology.platform + traced.to_yaml()
        if key not in self._traced:
            used = replace(topology, slices=1, devices=context * abstract_mesh(run, topology).shape["tensor"])
            step = abstract_step(traced, self.config, abstract_mesh(traced, used))
            self._traced[key] = _kept(step, self.config) * context / length
        return self._traced[key]


def attention_of(run: RunConfig, config: Phi3Config, mesh: AbstractMesh) -> str:
    """The attention kernel that the run has on the mesh's devices. Raises `InputError` where they lack it."""
    shape = (1, run.data.limit, config.num_attention_heads, config.head_dim)
    q = jax.eval_shape(partial(jnp.zeros, shape, run.model.dtype))
    with jax.sharding.use_abstract_mesh(mesh):
        return attention.kernel_for(q, run.model.attention)


def state_bytes(step: AbstractStep) -> dict[str, int]:
    """`weights`, `adapter` and `optimizer`, on each device."""
    trainable = step.state.trainable
    return {
        "weights": _bytes(step.frozen["model"]) + _bytes(trainable["model"]),
        "adapter": _bytes(step.frozen["lora"]) + _bytes(trainable["lora"]),
        "optimizer": _bytes(step.state.opt_state),
    }


def _bytes(tree: PyTree) -> int:
    """Of a device's share."""
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def _size(tree: PyTree) -> int:
    """Bytes of whole arrays."""
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def _kept(step: AbstractStep, config: Phi3Config) -> int:
    """Bytes that the scan over the layers hands to the backward pass, on each device."""
    sizes = step.mesh.shape
    rows = sizes["data"] * sizes["fsdp"] * sizes["context"]
    with jax.sharding.use_abstract_mesh(step.mesh.abstract_mesh):
        jaxpr = jax.make_jaxpr(step.function)(step.state, step.frozen, step.batch).jaxpr
    passes = [
        stacked_outputs(equation)
        for equation in scans(jaxpr)
        if equation.params["length"] == config.num_hidden_layers and not equation.params["reverse"]
    ]

    def of_device(value: ShapedArray) -> int:
        # What has the model's width is whole on all of `tensor`; heads and hidden units are cut.
        cut = rows if value.shape[-1] == config.hidden_size else rows * sizes["tensor"]
        return int(value.size * value.dtype.itemsize // cut)

    return max(sum(map(of_device, outputs)) for outputs in passes)


def _pairs(run: RunConfig, config: Phi3Config, mesh: AbstractMesh, kind: str) -> int:
    """What attention makes of pairs of positions in one layer, and of keys that devices of `context` share."""
    length, rows = run.data.limit, run.training.per_device_train_batch_size
    queries = length // int(mesh.shape["context"])
    heads = config.num_attention_heads // int(mesh.shape["tensor"])
    pairs = rows * queries * length
    gathered: int = 0
    if mesh.shape["context"] > 1:  # k and v of whole rows, and their gradients until they are summed
        gathered = 4 * rows * length * config.qkv_sizes[1] * jnp.dtype(run.model.dtype).itemsize
        gathered //= mesh.shape["tensor"]
    if kind == "xla":  # scores and probabilities in float32
        return gathered + 2 * pairs * heads * 4
    return gathered + (4 * pairs if kind == "cudnn" else 0)  # the mask, and what is added to the scores


def _pieces(run: RunConfig, mesh: AbstractMesh) -> int:
    """How many pieces a layer goes through a device's positions in."""
    return piece_count(run.training.chunk_mlp, run.data.limit // int(mesh.shape["context"]))


def _whole_rows(run: RunConfig, config: Phi3Config, mesh: AbstractMesh, kind: str, topology: Topology) -> float:
    """Bytes of a token that a layer cut into pieces has all the same, of whole rows.

    The gradient that comes, the one that goes and attention's, and a copy of the input; of heads q, k, v, the
    result, and two gradients at a time. A TPU fills heads up to 128 numbers, and splash gives the logarithm of the
    softmax's sum that often.
    """
    size, heads = jnp.dtype(run.model.dtype).itemsize, config.num_attention_heads + 2 * config.num_key_value_heads
    head = config.head_dim
    if topology.platform == "tpu":
        head = math.ceil(head / LANES) * LANES
    of_heads = (heads + 2 * config.num_key_value_heads + config.num_attention_heads) * head * size
    sums = config.num_attention_heads * LANES * 4 if kind == "splash" else 0
    return 4 * config.hidden_size * size + (of_heads + sums) / int(mesh.shape["tensor"])


def _layer_numbers(config: Phi3Config) -> int:
    """Weights of a layer."""
    return (matmul_parameters(config) - config.vocab_size * config.hidden_size) // config.num_hidden_layers


def _weight_shards(mesh: AbstractMesh) -> int:
    """Devices that share a weight and gather it for use."""
    return int(mesh.shape["fsdp"] * mesh.shape["context"])


def _layer_weights(run: RunConfig, config: Phi3Config, mesh: AbstractMesh) -> int:
    """A layer's weights as they are multiplied with, where a device does not keep them so."""
    if _weight_shards(mesh) == 1 and not (run.model.quantization or run.peft.full_finetuning):
        return 0
    return int(_layer_numbers(config) * jnp.dtype(run.model.dtype).itemsize // mesh.shape["tensor"])


def _loss(run: RunConfig, config: Phi3Config, mesh: AbstractMesh) -> int:
    """A chunk's logits, their gradient and what is between, and the gradient of the hidden states."""
    tokens = run.training.per_device_train_batch_size * run.data.limit // mesh.shape["context"]
    with jax.sharding.use_abstract_mesh(mesh):
        chunk = chunk_tokens(tokens, config.vocab_size)
    return int(3 * chunk * config.vocab_size * 4 // mesh.shape["tensor"] + 2 * tokens * config.hidden_size * 4)


def _gradients(step: AbstractStep) -> int:
    """Sums of gradients. Where devices share a batch, each has whole adapters, and sums of its own beside."""
    trainable, mesh = step.state.trainable, step.mesh.shape
    is_shared = mesh["data"] * mesh["fsdp"] * mesh["context"] > 1
    adapters = None if trainable["lora"] is None else trainable["lora"].adapters
    return _bytes(trainable) + (2 * _size(adapters) if is_shared else 0)
