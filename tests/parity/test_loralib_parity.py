"""The layers and helpers against loralib 0.1.2 itself, in float32.

Differences are relative to the largest number of an array. Measured on one machine they are below
1e-6, for sums of at most a few hundred products in another order; the bound is 3e-6.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

torch = pytest.importorskip("torch")
loralib = pytest.importorskip("loralib")

import phi3_jax.loralib as lora  # noqa: E402
from phi3_jax.loralib.kernels import layer_kernel, to_kernel, weight_name  # noqa: E402
from tests.helpers.models import filled  # noqa: E402

BIAS_MODES = ["none", "all", "lora_only"]


def assert_close(ours, theirs, rtol=3e-6):
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    assert ours.shape == theirs.shape
    assert np.abs(ours - theirs).max() <= rtol * np.abs(theirs).max()


def made(kind, *args, **kwargs):
    return filled(lambda: kind(*args, **kwargs, rngs=nnx.Rngs(0)))


def randomized(layer):
    """A loralib layer with nothing zero, as after some training."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(std=0.5)
    return layer


def copied(ours, theirs):
    """Our layer with the numbers of loralib's."""
    base = ours.base
    inner = getattr(theirs, "conv", theirs)
    kernel = jnp.asarray(inner.weight.detach().numpy())
    if not getattr(theirs, "fan_in_fan_out", False):
        kernel = to_kernel(base, kernel)
    getattr(base, weight_name(base))[...] = kernel
    if getattr(inner, "bias", None) is not None:
        base.bias[...] = inner.bias.detach().numpy().reshape(base.bias.shape)
    if hasattr(theirs, "lora_A"):
        lora.load_lora_state_dict(
            ours, {name: value.detach() for name, value in theirs.named_parameters() if "lora_" in name}
        )
    return ours


def our_numbers(layer, x):
    """(output, gradients of A, B and x) of a loss that weighs every output differently."""
    graph, arrays, rest = nnx.split(layer, lora.LoraParam, ...)

    def loss(arrays, x):
        y = nnx.merge(graph, arrays, rest)(x)
        return jnp.sum(y * jnp.sin(jnp.arange(y.size).reshape(y.shape))), y

    floats = jnp.issubdtype(x.dtype, jnp.floating)
    grads, y = jax.jit(jax.grad(loss, argnums=(0, 1) if floats else (0,), has_aux=True))(arrays, x)
    return y, [grads[0]["lora_A"][...], grads[0]["lora_B"][...], *grads[1:]]


def their_numbers(layer, x, to_ours=lambda y: y):
    x = x.clone().requires_grad_(x.is_floating_point())
    y = to_ours(layer(x))
    (y * torch.sin(torch.arange(y.numel()).reshape(y.shape).float())).sum().backward()
    grads = [layer.lora_A.grad, layer.lora_B.grad, *([x.grad] if x.is_floating_point() else [])]
    return y.detach(), grads


def channels_last(x):
    return x.movedim(1, -1)


def assert_equal_layers(ours, theirs, x, to_ours=lambda y: y):
    """Forward and gradients while training; forward merged, and unmerged again."""
    ours = copied(ours, randomized(theirs))
    ours_x = jnp.asarray(to_ours(x).numpy())
    y, grads = our_numbers(ours, ours_x)
    their_y, (grad_a, grad_b, *grad_x) = their_numbers(theirs, x, to_ours)
    assert_close(y, their_y)
    for our_grad, their_grad in zip(grads, [grad_a, grad_b, *map(to_ours, grad_x)], strict=True):
        assert_close(our_grad, their_grad)
    kernel = np.asarray(layer_kernel(ours.base))
    for _ in range(2):  # merging twice is merging once
        ours.eval()
    assert ours.merged
    assert_close(ours(ours_x), to_ours(evaluated(theirs, x)))
    ours.train()
    assert not ours.merged
    np.testing.assert_array_equal(layer_kernel(ours.base), kernel)


def evaluated(layer, x):
    layer.train(False)  # which merges; loralib's train() and eval() give back None
    with torch.no_grad():
        return layer(x)


@pytest.mark.parametrize("fan_in_fan_out", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_linear(fan_in_fan_out, bias):
    theirs = loralib.Linear(7, 5, r=3, lora_alpha=4, fan_in_fan_out=fan_in_fan_out, bias=bias)
    ours = made(lora.Linear, 7, 5, 3, 4, fan_in_fan_out=fan_in_fan_out, use_bias=bias)
    assert ours.kernel.shape == tuple(theirs.weight.shape)
    assert_equal_layers(ours, theirs, torch.randn(2, 6, 7))


def test_embedding():
    theirs = loralib.Embedding(11, 6, r=3, lora_alpha=4)
    assert_equal_layers(made(lora.Embedding, 11, 6, r=3, lora_alpha=4), theirs, torch.randint(11, (3, 8)))


@pytest.mark.parametrize(
    ("enable_lora", "fan_in_fan_out"),
    [
        ([True, False, True], False),
        ([True, False, True], True),
        ([False, True], False),
        ([True] * 3, True),
    ],
)
def test_merged_linear(enable_lora, fan_in_fan_out):
    settings = {"r": 2, "lora_alpha": 5, "enable_lora": enable_lora, "fan_in_fan_out": fan_in_fan_out}
    theirs = loralib.MergedLinear(7, 12, **settings)
    assert_equal_layers(made(lora.MergedLinear, 7, 12, **settings), theirs, torch.randn(2, 6, 7))


CONVS = [
    {"kernel_size": 3, "stride": 2, "padding": 1},
    {"kernel_size": 2, "padding": 2, "dilation": 2, "groups": 2},
    {"kernel_size": 1, "groups": 4, "bias": False},
    {"kernel_size": 3, "groups": 4, "stride": 2, "bias": False},
]
NAMES = {"stride": "strides", "dilation": "kernel_dilation", "groups": "feature_group_count", "bias": "use_bias"}


def equal_convs(dimensions, kernel_size, **settings):
    theirs = getattr(loralib, f"Conv{dimensions}d")(4, 8, kernel_size, r=2, lora_alpha=5, **settings)
    flax = {NAMES.get(name, name): value for name, value in {"padding": 0, **settings}.items()}
    ours = made(getattr(lora, f"Conv{dimensions}d"), 4, 8, kernel_size, r=2, lora_alpha=5, **flax)
    x = torch.randn(2, 4, *range(6, 6 + dimensions))
    return ours, theirs, x


@pytest.mark.parametrize("settings", CONVS, ids=str)
def test_conv_2d(settings):
    assert_equal_layers(*equal_convs(2, **settings), channels_last)


@pytest.mark.parametrize("dimensions", [1, 3])
@pytest.mark.parametrize("settings", [{"kernel_size": 1, "groups": 2, "stride": 2}], ids=str)
def test_conv_1d_and_3d_where_loralib_works(dimensions, settings):
    assert_equal_layers(*equal_convs(dimensions, **settings), channels_last)


@pytest.mark.parametrize("dimensions", [1, 3])
@pytest.mark.parametrize("settings", [{"kernel_size": 3, "groups": 2, "padding": 1}], ids=str)
def test_conv_1d_and_3d_with_a_window_where_loralib_fails(dimensions, settings):
    """By loralib's own forward pass, once A and B are of the shapes that fit."""
    ours, theirs, x = equal_convs(dimensions, **settings)
    with pytest.raises(RuntimeError, match="invalid for input of size"):
        theirs(x)
    theirs.lora_A = torch.nn.Parameter(torch.zeros(ours.lora_A.shape))
    theirs.lora_B = torch.nn.Parameter(torch.zeros(ours.lora_B.shape))
    assert_equal_layers(ours, theirs, x, channels_last)


def test_plain_flax_layers_with_the_same_adapters():
    """`init` and `apply` make of nnx.Linear, nnx.Embed and nnx.Conv what loralib's layers are."""
    settings = {"r": 2, "lora_alpha": 5}
    v_only = {"enable_lora": [False, False, True]}
    pairs = [
        (made(nnx.Linear, 7, 12), loralib.Linear(7, 12, **settings), {}),
        (made(nnx.LinearGeneral, 7, (3, 4)), loralib.MergedLinear(7, 12, **settings, **v_only), v_only),
        (made(nnx.Embed, 11, 6), loralib.Embedding(11, 6, **settings), {}),
        (
            made(nnx.Conv, 4, 8, (3, 3), padding=1, feature_group_count=2),
            loralib.Conv2d(4, 8, 3, **settings, padding=1, groups=2),
            {},
        ),
    ]
    inputs = [torch.randn(3, 7), torch.randn(3, 7), torch.randint(11, (3, 4)), torch.randn(2, 4, 5, 6)]
    for (plain, theirs, enable_lora), x in zip(pairs, inputs, strict=True):
        config = lora.Config(**settings, **enable_lora)
        adapters = filled(partial(lora.init, plain, {".*": config}, jax.random.key(0)))
        ours = copied(lora.apply(plain, adapters), randomized(theirs))
        to_ours = channels_last if x.ndim == 4 else torch.asarray
        with torch.no_grad():
            expected = to_ours(theirs(x)).numpy()
        found = ours(jnp.asarray(to_ours(x).numpy()))
        assert_close(found.reshape(expected.shape), expected)


class TheirModel(torch.nn.Module):
    """Every kind of layer, with and without bias and adapter."""

    def __init__(self):
        super().__init__()
        self.embed = loralib.Embedding(11, 6, r=2)
        self.fc = loralib.Linear(6, 6, r=2)
        self.no_offset = loralib.Linear(6, 6, r=2, bias=False)
        self.plain = loralib.Linear(6, 6)
        self.qkv = loralib.MergedLinear(6, 12, r=2, enable_lora=[True, False, True])
        self.conv = loralib.Conv2d(6, 4, 3, r=2)
        self.norm = torch.nn.LayerNorm(6)
        self.head = torch.nn.Linear(6, 3)


class OurModel(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.embed = lora.Embedding(11, 6, r=2, rngs=rngs)
        self.fc = lora.Linear(6, 6, r=2, rngs=rngs)
        self.no_offset = lora.Linear(6, 6, r=2, use_bias=False, rngs=rngs)
        self.plain = lora.Linear(6, 6, rngs=rngs)
        self.qkv = lora.MergedLinear(6, 12, r=2, enable_lora=[True, False, True], rngs=rngs)
        self.conv = lora.Conv2d(6, 4, 3, r=2, rngs=rngs)
        self.norm = nnx.LayerNorm(6, rngs=rngs)
        self.head = nnx.Linear(6, 3, rngs=rngs)


def theirs_named(name):
    """Flax's name of a base weight in PyTorch's."""
    return name.replace("kernel", "weight").replace("embedding", "weight").replace("scale", "weight")


@pytest.mark.parametrize("bias", BIAS_MODES)
def test_mark_only_lora_as_trainable(bias):
    theirs, ours = TheirModel(), filled(OurModel)
    loralib.mark_only_lora_as_trainable(theirs, bias)
    expected = {name: parameter.requires_grad for name, parameter in theirs.named_parameters()}
    mask = nnx.to_flat_state(lora.mark_only_lora_as_trainable(ours, bias))
    assert {theirs_named(".".join(path)): leaf.get_value() for path, leaf in mask} == expected


@pytest.mark.parametrize("bias", BIAS_MODES)
def test_lora_state_dict_both_ways(bias):
    """The same names and shapes; what we save loads into loralib, and the reverse."""
    theirs, ours = randomized(TheirModel()), filled(OurModel)
    state = loralib.lora_state_dict(theirs, bias)
    found = lora.lora_state_dict(ours, bias)
    assert {name: array.shape for name, array in found.items()} == {n: tuple(v.shape) for n, v in state.items()}
    lora.load_lora_state_dict(ours, state, bias)
    for name, array in lora.lora_state_dict(ours, bias).items():
        np.testing.assert_array_equal(array, state[name].detach().numpy())
    missing, unexpected = theirs.load_state_dict(
        {n: torch.tensor(np.asarray(a)) for n, a in found.items()}, strict=False
    )
    assert unexpected == []
    assert set(missing) == set(theirs.state_dict()) - set(found)


def test_loralibs_fault_is_not_ours():
    """Saved in evaluation mode and merged again: loralib adds the adapter twice."""
    theirs = randomized(loralib.Linear(7, 5, r=3, lora_alpha=4))
    ours = copied(made(lora.Linear, 7, 5, 3, 4), theirs)
    x = torch.randn(2, 7)
    expected = evaluated(theirs, x).numpy()
    again = loralib.Linear(7, 5, r=3, lora_alpha=4)
    again.load_state_dict(theirs.state_dict())
    assert np.abs(evaluated(again, x).numpy() - expected).max() > 0.1 * np.abs(expected).max()

    ours.eval()
    our_again = made(lora.Linear, 7, 5, 3, 4)
    nnx.update(our_again, nnx.state(ours))
    our_again.eval()
    assert_close(our_again(jnp.asarray(x.numpy())), expected)


def test_adapters_start_as_loralibs():
    """Bounds and variance, layer by layer."""
    torch.manual_seed(0)
    pairs = [
        (loralib.Linear(200, 50, r=40), nnx.Linear, (200, 50), lora.Config(40)),
        (
            loralib.MergedLinear(200, 60, r=20, enable_lora=[True, False, True]),
            nnx.Linear,
            (200, 60),
            lora.Config(20, enable_lora=[True, False, True]),
        ),
        (loralib.Conv2d(50, 10, 4, r=10), nnx.Conv, (50, 10, (4, 4)), lora.Config(10)),
        (loralib.Embedding(200, 200, r=40), nnx.Embed, (200, 200), lora.Config(40)),
    ]
    for theirs, kind, sizes, config in pairs:
        layer = nnx.eval_shape(lambda kind=kind, sizes=sizes: kind(*sizes, rngs=nnx.Rngs(0)))
        adapter = lora.init(layer, {".*": config}, jax.random.key(0))[""]
        for name in ("lora_A", "lora_B"):
            expected, found = getattr(theirs, name).detach().numpy(), np.asarray(getattr(adapter, name))
            assert found.shape == expected.shape
            assert found.std() == pytest.approx(expected.std(), rel=0.05)  # 8,000 draws: 0.6% for uniform ones
            if np.abs(expected).max() < 0.5:  # uniform, or zero
                assert np.abs(found).max() == pytest.approx(np.abs(expected).max(), rel=0.01)
