"""Keyword arguments of transformers' from_pretrained."""

import jax.numpy as jnp
import numpy as np
import pytest

from phi3_jax.config.foreign import table
from phi3_jax.hf.arguments import PASSED_OVER, Kept, named_dtype, pass_over, weights_kept
from phi3_jax.system.errors import InputError

NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}


def test_a_type_has_one_name():
    torch = pytest.importorskip("torch")
    for given in (jnp.bfloat16, jnp.dtype("bfloat16"), torch.bfloat16, "bfloat16", "torch.bfloat16"):
        assert named_dtype(given) == "bfloat16"
    assert named_dtype(np.float32) == named_dtype(torch.float32) == "float32"
    with pytest.raises(InputError, match="dtype is 3, expected float32, bfloat16 or float16"):
        named_dtype(3)


def test_what_means_nothing_is_named_with_its_reason(capsys):
    pass_over(
        "load", {"device_map": {"": 0}, "trust_remote_code": True, "max_memory": None, "variant": None}, ["dtype"]
    )
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        "device_map={'': 0} is passed over: JAX puts the model on its first device, or where `mesh` says",
        "trust_remote_code=True is passed over: no code out of a checkpoint is ever run",
    ]


def test_a_run_passes_the_same_over():
    """`model_init_kwargs` of TRL are these arguments, and what holds for a model in Python holds for a run's."""
    assert set(table().model.reasons) - {"token", "use_auth_token"} == set(PASSED_OVER)


def test_what_is_not_there_is_refused_all_at_once(capsys):
    with pytest.raises(TypeError, match=r"load\(\) got output_attentions=True, dtpye='x', which .* or give dtype$"):
        pass_over("load", {"output_attentions": True, "device_map": "auto", "dtpye": "x"}, ["dtype"])
    assert capsys.readouterr().out == ""
    # Only what transformers has as its own default is nothing; 1 is no True, and 0 no False.
    given = {"ignore_mismatched_sizes": True, "return_dict": 1, "force_download": 0, "output_attentions": False}
    with pytest.raises(TypeError, match="got ignore_mismatched_sizes=True, return_dict=1, force_download=0, which"):
        pass_over("load", given, [])


def test_a_bitsandbytes_configuration_says_what_the_weights_are_kept_in():
    assert weights_kept(None, None, None, None) == Kept("bfloat16", None, True)
    assert weights_kept("float32", "nf4", None, NF4) == Kept("float32", "nf4", False)
    assert weights_kept(None, None, None, NF4 | {"bnb_4bit_compute_dtype": "float16"}).dtype == "float16"
    assert weights_kept(None, None, None, NF4 | {"bnb_4bit_use_double_quant": True}).double_quant
    assert weights_kept("auto", None, None, NF4).dtype == "auto"


def test_contradictions_name_both_sides(capsys):
    with pytest.raises(InputError, match="quantization is 'int8' and quantization_config's 'nf4'"):
        weights_kept(None, "int8", None, NF4)
    with pytest.raises(InputError, match="double_quant is True and quantization_config's False"):
        weights_kept(None, None, True, NF4)
    with pytest.raises(InputError, match="bnb_4bit_quant_type is fp4"):
        weights_kept(None, None, None, {"load_in_4bit": True})
    # transformers has two types where there is one here, which is said.
    assert weights_kept("bfloat16", None, None, NF4 | {"bnb_4bit_compute_dtype": "float32"}).dtype == "bfloat16"
    assert "bnb_4bit_compute_dtype float32: all is computed in dtype bfloat16" in capsys.readouterr().out
