"""What trains of a model and its adapter."""

from phi3_jax import LoraConfig, init_lora
from phi3_jax.training.split import split_parameters
from tests.helpers.models import smallest_model
from tests.helpers.runs import run_config


def test_the_adapter_trains_and_the_base_does_not(tmp_path):
    import jax

    model = smallest_model()
    lora = init_lora(model, LoraConfig(r=2), jax.random.key(0))
    split = split_parameters(run_config(tmp_path), model, lora, lambda params: params)
    assert sum(x.size for x in jax.tree.leaves(split.trainable)) == split.table.trainable
    assert not jax.tree.leaves(split.trainable["model"])
    assert not jax.tree.leaves(split.frozen["lora"])
