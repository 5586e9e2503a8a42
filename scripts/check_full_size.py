"""Checks the full-size Phi-3-mini: loading, memory, logits, LoRA steps.

    python scripts/check_full_size.py --folder /somewhere/with/8GB          # random weights
    python scripts/check_full_size.py --parts real --real microsoft/Phi-3-mini-4k-instruct

Parts, each in a process of its own so that its peak memory is its own:
- `make`: a checkpoint of random bfloat16 weights, with the names and shapes of transformers' model.
- `load`: seconds, and peak host memory as a multiple of the parameters (at most 1.15).
- `forward`: bfloat16 logits. The truth is transformers' float32 model on the same weights. Rounding
  puts transformers' own bfloat16 model at some distance from it (root mean square over all
  logits); ours may be at most 1.25 times as far.
- `train`: two LoRA steps at rank 16 on all linear layers within 20 GiB.
- `qlora`: the 16-bit folder loaded in NF4 with at most 2.5 GiB of parameters, embeddings and head in
  bfloat16 included; then two LoRA steps like those of `train` at length 512, within 8 GiB.
- `qlora_ratio`: a step on NF4 takes at most 1.35 times as long as one on the unquantised weights, both
  at full width and length 512 but with 4 layers, in whichever of float32 and bfloat16 is faster here;
  `--ratio-layers 32` in bfloat16.
- `real`: the real weights' logits, against those of transformers' own tests.

`make` and `forward` need PyTorch. `forward` runs transformers' model with one layer's weights in
memory at a time, so that its float32 model fits wherever ours does.
"""

import argparse
import json
import math
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from phi3_jax.system.memory import resident_peak

PARTS = ("make", "load", "forward", "train", "qlora", "qlora_ratio", "real")
LOAD_RATIO, NOISE_RATIO, TRAIN_GIB = 1.15, 1.25, 20
NF4_GIB, QLORA_GIB, QLORA_RATIO = 2.5, 8, 1.35
TOKENS, TRAIN_TOKENS, QLORA_TOKENS = 24, 128, 512
RATIO_STEPS = 5
REAL_IDS = [[1212, 318, 281, 1672, 2643, 290, 428, 318, 257, 1332]]
# logits[0, 0, :8] in float32, from tests/models/phi3/test_modeling_phi3.py of transformers.
REAL_LOGITS = {
    4096: [8.9005, 8.5380, 12.0361, 9.1562, 7.4068, 10.2581, 7.8991, 7.2447],
    131072: [10.6076, 10.6499, 14.0601, 19.8499, 15.1787, 19.3717, 19.9782, 17.0394],
}


def make(folder: Path) -> dict[str, Any]:
    """Random bfloat16 weights, written shard by shard with the safetensors library."""
    import torch
    import transformers
    from huggingface_hub import split_torch_state_dict_into_shards
    from safetensors.torch import save_file

    config = transformers.Phi3Config(dtype="bfloat16", sliding_window=2047)
    with torch.device("meta"):
        shapes = transformers.Phi3ForCausalLM(config).state_dict()
    folder.mkdir(parents=True, exist_ok=True)
    shapes = {name: tensor.to(torch.bfloat16) for name, tensor in shapes.items()}
    split = split_torch_state_dict_into_shards(shapes, max_shard_size="1GB")
    random = torch.Generator().manual_seed(0)
    for file, names in split.filename_to_tensors.items():
        tensors = {}
        for name in names:
            tensor = torch.empty(shapes[name].shape, dtype=torch.bfloat16)
            # Norms that are all ones would hide a forgotten weight.
            tensor.uniform_(0.5, 1.5, generator=random) if "norm" in name else tensor.normal_(0, 0.02, generator=random)
            tensors[name] = tensor
        save_file(tensors, folder / file, metadata={"format": "pt"})
    index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config.save_pretrained(folder)
    return {"parameters": sum(shape.numel() for shape in shapes.values()), "bytes": split.metadata["total_size"]}


def _load(path: str | Path, dtype: str, quantization: str | None = None) -> Any:
    from phi3_jax import Phi3ForCausalLM

    return Phi3ForCausalLM.from_pretrained(str(path), dtype=dtype, quantization=quantization)


def _count(model: Any) -> int:
    import jax

    return sum(leaf.size for leaf in jax.tree.leaves(model))


def load(folder: Path) -> dict[str, Any]:
    """Time and peak memory of loading; the interpreter and its libraries are counted in."""
    start = time.perf_counter()
    model = _load(folder, "bfloat16")
    seconds = time.perf_counter() - start
    parameters = _count(model)
    ratio = resident_peak() / (2 * parameters)
    if parameters != 3_821_079_552 or ratio > LOAD_RATIO:
        raise SystemExit(
            f"load: {parameters:,} parameters, peak memory {ratio:.3f} times theirs (at most {LOAD_RATIO})"
        )
    return {
        "parameters": parameters,
        "seconds": round(seconds, 1),
        "peak_bytes": resident_peak(),
        "ratio": round(ratio, 4),
    }


def _input_ids(tokens: int = TOKENS) -> np.ndarray:
    return np.random.default_rng(0).integers(3, 32000, (1, tokens))


def _transformers_logits(folder: Path, dtype_name: str) -> np.ndarray:
    """transformers' own forward pass; each module gets its weights just before it runs."""
    import torch
    import transformers
    from safetensors import safe_open
    from transformers.models.phi3.modeling_phi3 import Phi3RotaryEmbedding

    dtype = getattr(torch, dtype_name)
    config = transformers.AutoConfig.from_pretrained(folder)
    with torch.device("meta"):
        model = transformers.Phi3ForCausalLM(config).eval()
    model.model.rotary_emb = Phi3RotaryEmbedding(config)
    files = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]

    def fetch(name: str) -> torch.Tensor:
        with safe_open(folder / files[name], "pt") as file:
            return file.get_tensor(name).to(dtype)

    def materialise(prefix: str) -> Any:
        def hook(module: Any, _args: Any) -> None:
            module.load_state_dict({name: fetch(f"{prefix}.{name}") for name in module.state_dict()}, assign=True)

        return hook

    for prefix, module in model.named_modules():
        # Whole decoder layers, and what stands outside them.
        inside = prefix.startswith("model.layers.") and prefix.count(".") > 2
        if prefix and not inside and prefix not in ("model", "model.layers", "model.rotary_emb"):
            module.register_forward_pre_hook(materialise(prefix))
            module.register_forward_hook(lambda module, _args, _output: module.to("meta") and None)
    with torch.no_grad():
        logits: np.ndarray = model(torch.tensor(_input_ids()), use_cache=False).logits.float().numpy()
    return logits


def forward_reference(folder: Path, dtype_name: str) -> dict[str, Any]:
    np.save(folder / f"logits_{dtype_name}.npy", _transformers_logits(folder, dtype_name))
    return {"peak_bytes": resident_peak()}


def forward(folder: Path) -> dict[str, Any]:
    """Our bfloat16 logits and transformers', both against transformers' in float32."""
    for dtype in ("float32", "bfloat16"):
        _in_subprocess("forward_reference", folder, dtype)
    truth, theirs = (np.load(folder / f"logits_{dtype}.npy") for dtype in ("float32", "bfloat16"))
    start = time.perf_counter()
    ours = np.asarray(_load(folder, "bfloat16")(_input_ids()))

    def rms(x: np.ndarray) -> float:
        return float(np.sqrt(np.mean(np.square(x, dtype=np.float64))))

    ratio = rms(ours - truth) / rms(theirs - truth)
    result = {
        "rms_logits": rms(truth),
        "rms_error_transformers": rms(theirs - truth),
        "rms_error": rms(ours - truth),
        "ratio": round(ratio, 4),
        "max_error_transformers": float(np.abs(theirs - truth).max()),
        "max_error": float(np.abs(ours - truth).max()),
        "seconds": round(time.perf_counter() - start, 1),
        "peak_bytes": resident_peak(),
    }
    if not ratio <= NOISE_RATIO:
        raise SystemExit(f"forward: beyond the noise of bfloat16: {result}")
    return result


def _lora_step() -> Any:
    """Compiled: loss and gradients of the adapter, each layer computed anew in the backward pass."""
    import jax

    from phi3_jax.objectives.next_token import loss as mean_loss

    @jax.jit
    def step(model: Any, lora: Any, batch: Any) -> Any:
        return jax.value_and_grad(lambda lora: mean_loss(model, lora, batch, remat=True))(lora)

    return step


def _init_lora(model: Any) -> Any:
    import jax

    from phi3_jax import LoraConfig, init_lora

    return init_lora(model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"), jax.random.key(0))


def _train(model: Any, tokens: int, most_gib: float) -> dict[str, Any]:
    """Two plain gradient steps on the adapter; the loss on the same row must change."""
    import jax
    import jax.numpy as jnp

    lora = _init_lora(model)
    trainable = sum(leaf.size for leaf in jax.tree.leaves(lora))
    batch = {"input_ids": jnp.asarray(_input_ids(tokens))}
    step, losses, seconds = _lora_step(), [], []
    for _ in range(2):
        start = time.perf_counter()
        loss, grads = step(model, lora, batch)
        lora = jax.tree.map(lambda p, g: p - 0.1 * g / (jnp.abs(g).max() + 1e-12), lora, grads)
        losses.append(float(loss))
        seconds.append(round(time.perf_counter() - start, 1))
    result = {
        "trainable_parameters": trainable,
        "losses": losses,
        "seconds": seconds,  # the first with compilation
        "peak_bytes": resident_peak(),
        "peak_gib": round(resident_peak() / 2**30, 2),
    }
    fine = trainable == 25_165_824 and all(map(math.isfinite, losses)) and losses[0] != losses[1]
    if not fine or resident_peak() > most_gib * 2**30:
        raise SystemExit(f"train: at most {most_gib} GiB and a loss that changes: {result}")
    return result


def train(folder: Path) -> dict[str, Any]:
    return _train(_load(folder, "bfloat16"), TRAIN_TOKENS, TRAIN_GIB)


def qlora(folder: Path) -> dict[str, Any]:
    """Loading in NF4 and training, in one process: the peak is that of both."""
    import jax

    start = time.perf_counter()
    model = _load(folder, "bfloat16", "nf4")
    seconds = round(time.perf_counter() - start, 1)
    gib = sum(leaf.nbytes for leaf in jax.tree.leaves(model)) / 2**30
    if gib > NF4_GIB:
        raise SystemExit(f"qlora: {gib:.3f} GiB of parameters, at most {NF4_GIB}")
    loaded = {
        "parameters_gib": round(gib, 3),
        "load_seconds": seconds,
        "load_peak_gib": round(resident_peak() / 2**30, 2),
    }
    return {**loaded, **_train(model, QLORA_TOKENS, QLORA_GIB)}


def qlora_ratio(folder: Path, layers: str = "4") -> dict[str, Any]:
    """Seconds of the fastest of some steps, taken in turns, so that a busy machine slows all alike.

    In float32 the full depth would not fit beside the rest: there it is bfloat16 alone.
    """
    import jax
    import jax.numpy as jnp

    from phi3_jax import Phi3Config
    from phi3_jax.performance.weights import random_model

    config = replace(Phi3Config.from_pretrained(folder), num_hidden_layers=int(layers))
    step, batch = _lora_step(), {"input_ids": jnp.asarray(_input_ids(QLORA_TOKENS))}
    models = {}
    dtypes = ("float32", "bfloat16") if config.num_hidden_layers <= 8 else ("bfloat16",)
    for dtype in dtypes:
        models[dtype] = random_model(config, dtype=jnp.dtype(dtype))
        models[f"{dtype} nf4"] = random_model(config, dtype=jnp.dtype(dtype), quantization="nf4")
    lora = _init_lora(models["bfloat16"])
    times: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(1 + RATIO_STEPS):  # the first compiles
        for name, model in models.items():
            start = time.perf_counter()
            jax.block_until_ready(step(model, lora, batch))
            times[name].append(time.perf_counter() - start)
    seconds = {name: round(min(taken[1:]), 3) for name, taken in times.items()}
    fastest = min(dtypes, key=lambda dtype: seconds[dtype])
    result: dict[str, Any] = {
        "seconds": seconds,
        "faster": fastest,
        "ratio": round(seconds[f"{fastest} nf4"] / seconds[fastest], 3),
    }
    if result["ratio"] > QLORA_RATIO:
        raise SystemExit(f"qlora_ratio: at most {QLORA_RATIO}: {result}")
    return result


def real(path_or_id: str) -> dict[str, Any]:
    """float32 logits of the real weights, within 1e-4 as in transformers' own test."""
    model = _load(path_or_id, "float32")
    logits = np.asarray(model(np.asarray(REAL_IDS)))[0, 0, :8]
    expected = np.asarray(REAL_LOGITS[model.config.max_position_embeddings])
    error = float(np.abs(logits - expected).max())
    if not np.allclose(logits, expected, rtol=1e-4, atol=1e-4):
        raise SystemExit(f"real: logits {logits.tolist()}, expected {expected.tolist()}")
    return {"max_error": error, "peak_bytes": resident_peak()}


def _in_subprocess(part: str, *arguments: Any) -> None:
    command = [sys.executable, __file__, "--worker", part, *map(str, arguments)]
    if subprocess.run(command, check=False).returncode != 0:
        raise SystemExit(f"{part}: failed")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("phi3_full"), help="of the random checkpoint, 7.7 GB")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS[:-1])
    parser.add_argument("--ratio-layers", type=int, default=4, help="of the part `qlora_ratio` (default: 4)")
    parser.add_argument("--real", help="folder or hub id of the real weights, for the part `real`")
    parser.add_argument("--worker", nargs="+", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        part, *rest = arguments.worker
        result = globals()[part](*([rest[0]] if part == "real" else [Path(rest[0]), *rest[1:]]))
        print(json.dumps({part: result}), flush=True)
        return
    if "real" in arguments.parts and not arguments.real:
        parser.error("the part `real` needs --real PATH_OR_ID")
    for part in arguments.parts:
        more = [arguments.ratio_layers] if part == "qlora_ratio" else []
        _in_subprocess(part, arguments.real if part == "real" else arguments.folder, *more)


if __name__ == "__main__":
    main()
