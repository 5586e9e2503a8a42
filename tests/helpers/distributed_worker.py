"""One of several processes, or the only one, with 8 simulated devices in all: takes part in what a run
does together and writes down what it saw, for test_distributed.py to judge."""

import json
import os
import shutil
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from huggingface_hub import constants
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from phi3_jax import InputError
from phi3_jax.data import cache, eval_batches, prepare, train_batches
from phi3_jax.hf import load, safetensors_io
from phi3_jax.hf.checkpoint import Checkpoint
from phi3_jax.hf.save import save_model
from phi3_jax.parallel import distributed
from phi3_jax.parallel.layout import weight_sharding
from phi3_jax.training.checkpoints import Checkpoints
from phi3_jax.training.step import TrainState
from tests.helpers.distributed_inputs import BATCHES, BROKEN, CHATS, DATA, rows
from tests.helpers.shards import edit_shard
from tests.helpers.tokenizers import tiny_tokenizer


def said(function, *arguments, **options):
    """The error that a call raises."""
    try:
        function(*arguments, **options)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def agreement(process: int) -> dict[str, str]:
    found = {"same": said(distributed.check_agreement, {"configuration": "seed: 1", "data": "abc"})}
    texts = {"configuration": f"seed: 1\nlearning_rate: 1e-{4 + process}\n", "data": "abc" if process else "abcd"}
    found["different"] = said(distributed.check_agreement, texts)
    versions = {"jax": "0.10.2", "jaxlib": "0.10.2", "phi3_jax": "0.1.0"}
    try:
        distributed.package_versions = lambda *_: {**versions, "jax": "9.9"} if process else versions
        found["version"] = said(distributed.check_agreement, {})
    finally:
        distributed.package_versions = lambda *_: versions
    count = jax.local_device_count
    try:
        jax.local_device_count = lambda: 4 + process
        found["devices"] = said(distributed.check_agreement, {})
    finally:
        jax.local_device_count = count
    return found


def failures(process: int) -> dict[str, str]:
    def block(fails: bool, error: Exception) -> None:
        with distributed.together():
            if fails:
                raise error

    return {
        "nobody": said(block, False, ValueError("x")),
        "input": said(block, process == 1, InputError("data.train is missing")),
        "other": said(block, process == 0, OSError(28, "No space left")),
        "barrier": said(distributed.barrier, f"at {process}"),
    }


def mesh() -> Mesh:
    """2 x 2 x 2, with `data` the innermost: of two processes the first has fsdp 0 and the second fsdp 1."""
    devices = np.array(jax.devices()).reshape(2, 2, 2, 1).transpose(2, 0, 1, 3)
    return Mesh(devices, ("data", "fsdp", "tensor", "context"), axis_types=(AxisType.Auto,) * 4)


def shardings(where: Mesh):
    def sharding(path: tuple[str, ...], shape: tuple[int, ...]) -> NamedSharding:
        if "norm" in path[-2]:
            return NamedSharding(where, P())
        if path[-2] in ("o_proj", "down_proj"):
            return NamedSharding(where, P(None, "fsdp", "tensor"))
        return NamedSharding(where, P(*[None] * (len(shape) - 2), ("tensor", "fsdp")))

    return sharding


def loading(folder: Path, where: Mesh, process: int) -> dict[str, int]:
    """Loads and saves again: whole, in parts, and quantised. Returns the bytes read while it loaded whole."""
    counts: list[int] = []
    read_exactly = safetensors_io._read_exactly
    safetensors_io._read_exactly = lambda file, out: (counts.append(out.nbytes), read_exactly(file, out))[1]
    sizes: list[int] = []
    empty = load.aligned_empty
    load.aligned_empty = lambda shape, dtype: (array := empty(shape, dtype), sizes.append(array.nbytes))[0]
    model = Checkpoint.open(folder / "base").load_model(dtype=jnp.float32, shardings=shardings(where))
    found = {"bytes": sum(counts), "largest": max(sizes)}
    qkv = model.model.layers.self_attn.qkv_proj.weight[...]
    assert qkv.sharding.spec == P(None, ("tensor", "fsdp"))
    save_model(model, folder / "saved", max_shard_size=20_000)
    parted = Checkpoint.open(folder / "base").load_model(dtype=jnp.float32, shardings=shardings(where), split=True)
    parts = parted.model.layers.self_attn.qkv_proj.weight.get_value().parts
    found["parts"] = [[list(part.shape), list(part.addressable_shards[0].data.shape)] for part in parts]
    save_model(parted, folder / "parted")
    flat = lambda path, shape: NamedSharding(where, P(None, "fsdp") if len(shape) == 3 else P())  # noqa: E731
    quantized = Checkpoint.open(folder / "base").load_model(dtype=jnp.float32, quantization="nf4", shardings=flat)
    codes = quantized.model.layers.mlp.gate_up_proj.weight.get_value().codes
    found["codes"] = list(codes.addressable_shards[0].data.shape)
    save_model(quantized, folder / "quantized")
    (folder / "occupied").mkdir(exist_ok=True)
    (folder / "occupied" / "adapter_config.json").write_text("{}")
    found["occupied"] = said(save_model, model, folder / "occupied")
    return found


def loading_shared(folder: Path) -> dict[str, object]:
    """Loads where `data` lies between the processes: the bytes read, and the arrays that differ from the files'."""
    devices = np.array(jax.devices()).reshape(2, 2, 2, 1)
    where = Mesh(devices, ("data", "fsdp", "tensor", "context"), axis_types=(AxisType.Auto,) * 4)
    opened = Checkpoint.open(folder / "base")
    counts: list[int] = []
    read_exactly = safetensors_io._read_exactly
    safetensors_io._read_exactly = lambda file, out: (counts.append(out.nbytes), read_exactly(file, out))[1]
    found: dict[str, object] = {"differ": []}
    laid_out = partial(weight_sharding, mesh=where)
    for name, options in {"dense": {}, "split": {"split": True}, "nf4": {"quantization": "nf4"}}.items():
        counts.clear()
        loaded = opened.load_model(dtype=jnp.float32, shardings=laid_out, **options)
        found[name] = sum(counts)
        alone = Checkpoint.open(folder / "base").load_model(dtype=jnp.float32, quantization=options.get("quantization"))
        weights = [jax.tree_util.tree_leaves_with_path(nnx.state(model)) for model in (loaded, alone)]
        if name != "split":
            for (path, array), (_, whole) in zip(*weights, strict=True):
                shards = [np.array_equal(np.asarray(whole)[s.index], s.data) for s in array.addressable_shards]
                found["differ"] += [] if all(shards) else [f"{name} {jax.tree_util.keystr(path)}"]
    saved = shutil.copytree(folder / "base", folder / f"broken-{jax.process_index()}")
    if jax.process_index() == 1:
        edit_shard(next(saved.glob("*.safetensors")), lambda tensors: tensors[BROKEN].fill(np.nan))
    found["broken"] = said(Checkpoint.open(saved).load_model, dtype=jnp.float32, shardings=laid_out)
    safetensors_io._read_exactly = read_exactly
    return found


def batches(where: Mesh) -> dict[str, np.ndarray]:
    """The second training batch and the first to evaluate, put together of what the processes assembled."""
    found = {}
    training = NamedSharding(where, P(None, ("data", "fsdp"), "tensor"))
    part = distributed.local_rows(training, (2, 4, DATA.max_length))
    stream = train_batches(rows(), DATA, **BATCHES, part=part)
    next(stream)
    for name, array in distributed.place(next(stream), training, 4).items():
        assert array.sharding == training
        found[f"train {name}"] = distributed.to_host(array)
    evaluation = NamedSharding(where, P(("data", "fsdp"), "tensor"))
    part = distributed.local_rows(evaluation, (4, DATA.max_length))
    batch = next(iter(eval_batches(rows(), DATA, batch_size=4, pad_id=0, part=part)))
    found |= {f"eval {name}": distributed.to_host(x) for name, x in distributed.place(batch, evaluation, 4).items()}
    return found | {"part": np.array(part)}


def state(where: Mesh, spec: P, factor: float) -> TrainState:
    """A state of global arrays: what trains and its moments by `spec`, all else on every device."""

    def make() -> TrainState:
        trainable = {"lora": {"A": factor * jnp.arange(32.0).reshape(4, 8)}}
        created = TrainState.create(trainable, optax.adam(1e-3), jax.random.key(3))
        return jax.tree.map(lambda x: x + int(factor) if x.dtype == jnp.int32 else x, created)

    kept = jax.tree.map(lambda x: NamedSharding(where, spec if x.ndim == 2 else P()), jax.eval_shape(make))
    return jax.jit(make, out_shardings=kept)()


def checkpoints(folder: Path, where: Mesh) -> dict[str, object]:
    saved = Checkpoints(folder / "checkpoints", None)
    for step in (1, 2):
        saved.save(step, state(where, P("fsdp", "tensor"), step), {"step": step}, None)
    restored, progress = saved.restore(state(where, P("data", "fsdp"), 0.0), 1)
    saved.close()
    lora = restored.trainable["lora"]["A"]
    return {
        "progress": progress,
        "spec": str(lora.sharding.spec),
        "step": int(restored.step),
        "lora": distributed.to_host(lora).tolist(),
    }


def joined(process: int) -> list[object]:
    """Arrays of different lengths, in pieces smaller than they are; such as have 64 bits, and none."""
    gathered, distributed._GATHERED = distributed._GATHERED, 2**12
    try:
        long = distributed.joined(np.arange(3000 if process == 0 else 5) * 2**33 + process)
        empty = distributed.joined(np.zeros(0, np.int32))
    finally:
        distributed._GATHERED = gathered
    return [long.tolist(), empty.tolist()]


def preparing(folder: Path, process: int) -> dict[str, object]:
    """Prepares rows, twice more from the cache if all have it, and some that are wrong. Leaves the rows in a file."""
    os.chdir(folder / "rows")
    constants.HF_HOME = str(folder / f"hub-{process}")
    cache.LEAST_SECONDS, prepare.LEAST_SHARED = 0.0, 2
    made, tokenize_rows = [], prepare.tokenize_rows
    prepare.tokenize_rows = lambda *a, **k: (made.append(k["shared"]), tokenize_rows(*a, **k))[1]
    tokenizer = tiny_tokenizer()
    seen = []
    for _ in range(3):
        found = prepare.prepare_data(CHATS, tokenizer, seed=3)
        for train in (found.train, found.eval_sets["eval"]):
            where = [train.where(row) for row in range(len(train))]
            arrays = train.input_ids, train.loss_mask, train.offsets, train.prompt_lengths
            seen.append([[a.tolist() for a in arrays], list(train.references), where, train.stats.to_dict()])
        if len(seen) == 4 and process == 1:
            shutil.rmtree(constants.HF_HOME)
    prepare.tokenize_rows = tokenize_rows

    def fails(train: str, **options: object) -> str:
        return said(prepare.prepare_data, replace(CHATS, train=train, **options), tokenizer, seed=3)

    os.chdir(folder / "rows" / str(process))
    return {
        "rows": seen,
        "made": made,
        "late": fails("../late.jsonl"),
        "both": fails("../both.jsonl"),
        "empty": fails("../empty.jsonl", skip_empty=True),
        "different": fails("different.jsonl") if jax.process_count() > 1 else "",
        "missing": fails("missing.jsonl") if jax.process_count() > 1 else "",
    }


def main() -> None:
    folder = Path(sys.argv[1])
    distributed.initialize()
    distributed.initialize()  # once is enough
    process = jax.process_index()
    found = {"processes": jax.process_count(), "main": distributed.is_main()}
    if jax.process_count() > 1:
        found |= agreement(process) | failures(process) | {"joined": joined(process)}
    found["prepared"] = preparing(folder, process)
    where = mesh()
    found |= loading(folder, where, process) | checkpoints(folder, where)
    found["shared"] = loading_shared(folder)
    np.savez(folder / f"batches-{process}.npz", **batches(where))
    (folder / f"found-{process}.json").write_text(json.dumps(found))


main()
