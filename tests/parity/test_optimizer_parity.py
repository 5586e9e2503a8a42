"""Optimizers against bitsandbytes', PEFT's and transformers' own."""

import functools
import importlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
bnb = pytest.importorskip("bitsandbytes")
transformers = pytest.importorskip("transformers")

import bitsandbytes.backends.cpu.ops as bnb_cpu  # noqa: E402
from peft.optimizers.lorafa import LoraFAOptimizer  # noqa: E402
from transformers.training_args import OptimizerNames  # noqa: E402

from phi3_jax.config import foreign  # noqa: E402
from phi3_jax.config.run import RunConfig  # noqa: E402
from phi3_jax.config.training import TrainingSection  # noqa: E402
from phi3_jax.lora.adapters import LoraLinear  # noqa: E402
from phi3_jax.optim import loraplus  # noqa: E402
from phi3_jax.optim.adam8bit import BLOCK_SIZE, QuantizedMoment, dequantize, quantize  # noqa: E402
from phi3_jax.optim.optimizer import make_optimizer  # noqa: E402
from phi3_jax.optim.schedule import make_schedule  # noqa: E402
from phi3_jax.quant.dynamic import dynamic_map  # noqa: E402
from phi3_jax.system.errors import InputError  # noqa: E402
from tests.helpers.references import torch_phi3  # noqa: E402

STEPS = 30


def nearest_by_definition(values: np.ndarray, code: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(codes, absmax) of a flat float32 array, blocks of 256; distances in float64."""
    codes, absmax = [], []
    for start in range(0, values.size, BLOCK_SIZE):
        block = values[start : start + BLOCK_SIZE]
        absmax.append(np.abs(block).max())
        scaled = block / (absmax[-1] or np.float32(1))
        codes.append(np.abs(scaled.astype(np.float64)[:, None] - code.astype(np.float64)).argmin(axis=1))
    return np.concatenate(codes).astype(np.uint8), np.array(absmax, np.float32)


# 8 bits.


@pytest.mark.parametrize("signed", [True, False])
def test_the_codebooks_are_those_of_bitsandbytes_bit_for_bit(signed):
    np.testing.assert_array_equal(dynamic_map(signed=signed), bnb.functional.create_dynamic_map(signed=signed).numpy())


@pytest.mark.parametrize("signed", [True, False])
def test_codes_are_the_nearest_and_values_those_of_bitsandbytes(signed):
    rng = np.random.default_rng(0)
    values = rng.normal(size=20 * BLOCK_SIZE + 77).astype(np.float32)
    values *= np.exp(rng.normal(scale=3, size=values.shape)).astype(np.float32)  # over all seven decades
    values[:BLOCK_SIZE] = 0
    values = values if signed else values**2
    code = dynamic_map(signed=signed)
    moment = quantize(jnp.asarray(values), signed=signed)
    codes, absmax = nearest_by_definition(values, code)
    np.testing.assert_array_equal(moment.absmax, absmax)
    np.testing.assert_array_equal(moment.codes, codes)
    back = torch.ops.bitsandbytes.dequantize_blockwise(
        torch.tensor(codes), torch.tensor(absmax), torch.tensor(code), BLOCK_SIZE, torch.float32
    )
    np.testing.assert_array_equal(dequantize(moment, signed=signed), back)


def test_thirty_steps_of_bitsandbytes_adamw8bit(monkeypatch):
    """Stacks of layers beside a parameter for each layer, with decay and a learning rate that changes."""

    # bitsandbytes' CPU code sees numbers in steps of 1.5e-5: up to seven codes off for small second moments.
    def nearest(values, code, absmax_out, codes_out, blocksize):
        assert blocksize == BLOCK_SIZE
        codes, absmax = nearest_by_definition(values.numpy().reshape(-1), code.numpy())
        codes_out.copy_(torch.tensor(codes).reshape(codes_out.shape))
        absmax_out.copy_(torch.tensor(absmax))

    monkeypatch.setattr(bnb_cpu, "_quant_blockwise_fp32_direct", nearest)
    rng = np.random.default_rng(1)
    shapes = {"lora_A": (2, 4, 1100), "lora_B": (2, 600, 4)}  # 4,400 numbers in a layer, and 2,400
    start = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    training = TrainingSection(
        optim="adamw_8bit",
        learning_rate=1e-2,
        lr_scheduler_type="linear",
        weight_decay=0.1,
        max_grad_norm=0.0,
        adam_epsilon=1e-3,  # large enough to tell where it is added
    )
    schedule = make_schedule(training, STEPS)
    tx = make_optimizer(training, schedule)
    update = jax.jit(tx.update)
    params = {"layers": jax.tree.map(jnp.asarray, start)}
    state = tx.init(params)
    theirs = {name: [torch.nn.Parameter(torch.tensor(layer)) for layer in x] for name, x in start.items()}
    optimizer = bnb.optim.AdamW8bit([p for stack in theirs.values() for p in stack], weight_decay=0.1, eps=1e-3)
    for i in range(STEPS):
        grads = {name: rng.normal(scale=0.1 + i % 3, size=s).astype(np.float32) for name, s in shapes.items()}
        grads["lora_A"][:, 0, :300] = 0  # a block of zeros in the moments
        updates, state = update({"layers": grads}, state, params)
        params = jax.tree.map(jnp.add, params, updates)
        optimizer.param_groups[0]["lr"] = float(schedule(i))
        for name, stack in theirs.items():
            for parameter, grad in zip(stack, grads[name], strict=True):
                parameter.grad = torch.tensor(grad)
        optimizer.step()
    for name, stack in theirs.items():
        expected = np.stack([p.detach().numpy() for p in stack])
        # Entries move by up to 0.2; 1e-5 was seen, from a few codes on the border between two numbers.
        np.testing.assert_allclose(params["layers"][name], expected, atol=5e-5)
    moments = state[1].mu["layers"], state[1].nu["layers"]
    for moment, number in zip(moments, ("1", "2"), strict=True):
        assert isinstance(moment["lora_A"], QuantizedMoment)
        assert moment["lora_B"].dtype == jnp.float32
        for layer, parameter in enumerate(theirs["lora_A"]):
            kept = optimizer.state[parameter]
            assert np.sum(moment["lora_A"].codes[layer] != kept[f"state{number}"].numpy()) < 5  # 1 was seen, of 4,400
            np.testing.assert_allclose(moment["lora_A"].absmax[layer], kept[f"absmax{number}"], rtol=1e-5)
        for layer, parameter in enumerate(theirs["lora_B"]):
            kept = optimizer.state[parameter][f"state{number}"]
            np.testing.assert_allclose(moment["lora_B"][layer], kept, rtol=1e-5, atol=1e-7)


def test_thirty_steps_of_transformers_adafactor():
    """Small and large matrices and a vector, in a stack and alone, with decay, clipped steps and a changing rate."""
    rng = np.random.default_rng(3)
    shapes = {"layers": {"lora_A": (2, 4, 300), "lora_B": (2, 600, 4), "bias": (2, 7)}, "lora_A": (200, 150)}
    draw = functools.partial(jax.tree.map, is_leaf=lambda node: isinstance(node, tuple))
    start = draw(lambda shape: rng.normal(size=shape).astype(np.float32), shapes)
    training = TrainingSection(
        optim="adafactor", learning_rate=1e-2, lr_scheduler_type="linear", weight_decay=0.1, max_grad_norm=0.0
    )
    schedule = make_schedule(training, STEPS)
    tx = make_optimizer(training, schedule)
    update = jax.jit(tx.update)
    params = jax.tree.map(jnp.asarray, start)
    state = tx.init(params)

    def tensors(tree):  # as a PyTorch model has them, one a layer
        return [*(layer for name in ("lora_A", "lora_B", "bias") for layer in tree["layers"][name]), tree["lora_A"]]

    theirs = [torch.nn.Parameter(torch.tensor(tensor)) for tensor in tensors(start)]
    biases = {4, 5}
    groups = [
        {
            "params": [p for i, p in enumerate(theirs) if (i in biases) == of_biases],
            "weight_decay": 0.1 * (not of_biases),
        }
        for of_biases in (False, True)
    ]
    optimizer = transformers.Adafactor(groups, lr=1e-2, scale_parameter=False, relative_step=False)
    for i in range(STEPS):
        grads = draw(lambda shape, i=i: rng.normal(scale=0.1 + i % 3, size=shape).astype(np.float32), shapes)
        grads["layers"]["lora_A"][1] *= 100  # which one layer alone has clipped
        updates, state = update(grads, state, params)
        params = jax.tree.map(jnp.add, params, updates)
        for group in optimizer.param_groups:
            group["lr"] = float(schedule(i))
        for parameter, grad in zip(theirs, tensors(grads), strict=True):
            parameter.grad = torch.tensor(grad)
        optimizer.step()
    for ours, parameter in zip(tensors(params), theirs, strict=True):
        # Entries move by 0.01 a step; float32 rounds entries of 4 in steps of 5e-7.
        np.testing.assert_allclose(ours, parameter.detach().numpy(), rtol=1e-6, atol=2e-6)


def test_the_unpatched_bitsandbytes_comes_close():
    """Its CPU code rounds some second moments to another number; the direction hardly changes."""
    rng = np.random.default_rng(2)
    start = rng.normal(size=5000).astype(np.float32)
    training = TrainingSection(optim="adamw_8bit", learning_rate=1e-2, lr_scheduler_type="constant", max_grad_norm=0.0)
    tx = make_optimizer(training, make_schedule(training, STEPS))
    params = {"lora_A": jnp.asarray(start)}
    state = tx.init(params)
    parameter = torch.nn.Parameter(torch.tensor(start))
    optimizer = bnb.optim.AdamW8bit([parameter], lr=1e-2, weight_decay=0.0)
    for _ in range(5):
        grad = (1 + rng.normal(scale=0.1, size=start.shape)).astype(np.float32)
        updates, state = jax.jit(tx.update)({"lora_A": grad}, state, params)
        params = jax.tree.map(jnp.add, params, updates)
        parameter.grad = torch.tensor(grad)
        optimizer.step()
    # Entries move by 0.05; 5e-4 was seen at most, and more than 1e-4 in 14 of 5,000.
    off = np.abs(params["lora_A"] - parameter.detach().numpy())
    assert off.max() < 1e-3
    assert np.mean(off > 1e-4) < 0.01


def test_lion_is_that_of_bitsandbytes():
    rng = np.random.default_rng(3)
    start = rng.normal(size=(20, 30)).astype(np.float32)
    training = TrainingSection(
        optim="lion",
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        weight_decay=0.1,
        max_grad_norm=0.0,
        adam_beta2=0.99,
    )
    tx = make_optimizer(training, make_schedule(training, STEPS))
    params = {"lora_A": jnp.asarray(start)}
    state = tx.init(params)
    parameter = torch.nn.Parameter(torch.tensor(start))
    optimizer = bnb.optim.Lion([parameter], lr=1e-2, weight_decay=0.1, betas=(0.9, 0.99), optim_bits=32)
    for _ in range(10):
        grad = rng.normal(size=start.shape).astype(np.float32)
        updates, state = tx.update({"lora_A": grad}, state, params)
        params = jax.tree.map(jnp.add, params, updates)
        parameter.grad = torch.tensor(grad)
        optimizer.step()
    np.testing.assert_allclose(params["lora_A"], parameter.detach(), rtol=1e-5, atol=1e-6)


# Names.


def run_with(**training) -> RunConfig:
    return RunConfig.from_dict({"model": {"name_or_path": "base"}, "training": training})


def test_every_name_of_transformers_is_known_or_refused_with_the_list(capsys):
    refused = {}
    for name in OptimizerNames:
        try:
            optim = run_with(optim=name).training.optim
        except InputError as error:
            refused[name.value] = str(error)
        else:
            notice = capsys.readouterr().out
            assert ("paged" in name.value) == ("paged" in notice)
            assert optim == foreign.table().optimizers[name.value][0]
    assert all("expected one of adamw, adamw_8bit, adafactor, lion, sgd, lorafa" in line for line in refused.values())
    words = "ademamix|lion_8bit|4bit|rmsprop|adagrad|galore|lomo|grok|schedule_free|apollo|stable"
    assert refused.keys() == {name.value for name in OptimizerNames if re.search(words, name.value)}


MAKEABLE = """
    adafactor adamw_8bit adamw_bnb_8bit adamw_torch adamw_torch_fused lion_32bit paged_adamw_32bit paged_adamw_8bit
    paged_lion_32bit sgd
"""  # the others need packages that are not here


@pytest.mark.parametrize("name", MAKEABLE.split())
def test_the_names_mean_what_transformers_makes_of_them(tmp_path, name):
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), optim=name, use_cpu=True, report_to="none", adam_beta1=0.8, adam_beta2=0.98
    )
    cls, kwargs = transformers.Trainer.get_optimizer_cls_and_kwargs(arguments)
    bits = kwargs.get("optim_bits")
    ours = {"AdamW": "adamw_8bit" if bits == 8 else "adamw", "Lion": "lion", "SGD": "sgd", "Adafactor": "adafactor"}
    assert foreign.table().optimizers[name][0] == ours[cls.__name__]
    if cls.__name__ == "Lion":
        assert kwargs["betas"] == (0.8, 0.98)
        assert bits == 32


# LoRA+.

LAYER = re.compile(r"\.layers\.\d+\.")


def our_name(name: str) -> str:
    """The leaf that stands for a parameter of PEFT's, in all layers together."""
    name = LAYER.sub(".layers.", name.removeprefix("base_model.model."))
    name = re.sub(r"\.lora_(?:embedding_)?([AB])\.default(?:\.weight)?$", r".lora_\1", name)
    name = name.replace(".lora_B.default.bias", ".lora_bias")
    name = name.replace(".lora_magnitude_vector.default.weight", ".magnitude")
    name = name.replace(".token_adapter.trainable_tokens_delta.default", ".rows")
    return name.replace(".modules_to_save.default.weight", "")


VARIANTS = {
    "dora, embedding, saved": {
        "use_dora": True,
        "target_modules": ["qkv_proj", "embed_tokens"],
        "modules_to_save": ["lm_head", "norm"],
    },
    "bias, tokens": {"lora_bias": True, "target_modules": ["down_proj"], "trainable_token_indices": [3, 4, 5]},
    "embedding saved": {"target_modules": "all-linear", "modules_to_save": ["embed_tokens"]},
}


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_lora_plus_has_the_groups_of_peft(variant):
    model = peft.get_peft_model(torch_phi3(), peft.LoraConfig(r=4, task_type="CAUSAL_LM", **variant))
    optimizer = peft.optimizers.create_loraplus_optimizer(
        model, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16.0, loraplus_weight_decay=0.1, loraplus_lr_embedding=5e-5
    )
    theirs = {id(p): (g["lr"], g["weight_decay"]) for g in optimizer.param_groups for p in g["params"]}
    expected, params = {}, {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            ours = our_name(name)
            expected[ours] = theirs[id(p)]
            params[ours] = jnp.zeros((3, *p.shape) if "layers" in ours else p.shape)
    training = TrainingSection(learning_rate=1e-3, loraplus_lr_ratio=16.0, loraplus_lr_embedding=5e-5, weight_decay=0.1)
    factors, decayed = loraplus.learning_rate_factors(params, training), loraplus.decays(params)
    assert len(expected) >= 4
    for name, (rate, decay) in expected.items():
        np.testing.assert_allclose(1e-3 * factors[name], rate, rtol=1e-9, err_msg=name)
        assert 0.1 * decayed[name] == decay, name


# LoRA-FA.


def test_lora_fa_steps_as_pefts_also_where_a_has_equal_rows_and_beside_other_parameters(monkeypatch):
    monkeypatch.setattr(importlib.import_module("peft.optimizers.lorafa"), "is_bf16_available", lambda: False)
    rng = np.random.default_rng(4)

    def random(*shape):
        return rng.normal(size=shape).astype(np.float32)

    a, b, head = random(2, 4, 30), random(2, 20, 4), random(10, 6)
    a[1, 3] = a[1, 2]  # A Aᵀ has no inverse in this layer
    training = TrainingSection(
        optim="lorafa", learning_rate=1e-2, lr_scheduler_type="constant", weight_decay=0.1, max_grad_norm=0.0
    )
    frozen = {"layers": {"o_proj": LoraLinear(jnp.asarray(a), None, 1.5)}, "lm_head": None}
    params = {"layers": {"o_proj": LoraLinear(None, jnp.asarray(b), 1.5)}, "lm_head": jnp.asarray(head)}
    tx = make_optimizer(training, make_schedule(training, STEPS), frozen)
    state = tx.init({"lora": params})

    layers = [
        (torch.nn.Parameter(torch.tensor(x), False), torch.nn.Parameter(torch.tensor(y)))
        for x, y in zip(a, b, strict=True)
    ]
    other = torch.nn.Parameter(torch.tensor(head))
    group = {
        "params": [p for pair in layers for p in pair] + [other],
        "names": [f"{i}.lora_{x}" for i in range(2) for x in "AB"] + ["lm_head"],
        "scaling_factors": [1.5] * 4 + [None],
        "lr": 1e-2,
        "weight_decay": 0.1,
        "eps": training.adam_epsilon,
    }
    optimizer = LoraFAOptimizer([group])
    for _ in range(10):
        grad_b, grad_head = random(2, 20, 4), random(10, 6)
        grads = {"layers": {"o_proj": LoraLinear(None, jnp.asarray(grad_b), 1.5)}, "lm_head": jnp.asarray(grad_head)}
        updates, state = tx.update({"lora": grads}, state, {"lora": params})
        params = jax.tree.map(jnp.add, params, updates["lora"])
        for (_, parameter), grad in zip(layers, grad_b, strict=True):
            parameter.grad = torch.tensor(grad)
        other.grad = torch.tensor(grad_head)
        optimizer.step()
    expected = np.stack([parameter.detach().numpy() for _, parameter in layers])
    np.testing.assert_allclose(params["layers"]["o_proj"].lora_B, expected, atol=1e-5)
    np.testing.assert_allclose(params["lm_head"], other.detach(), atol=1e-6)
