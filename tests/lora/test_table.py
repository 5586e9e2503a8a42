import jax

from phi3_jax import LoraConfig
from phi3_jax.lora import format_parameter_table, init_lora, parameter_table


def table(model, **config):
    lora = jax.eval_shape(lambda key: init_lora(model, LoraConfig(**config), key), jax.random.key(0))
    return parameter_table(model, lora)


def test_all_linear_of_phi3_mini(abstract_phi3_mini):
    made = table(abstract_phi3_mini, r=16)
    assert {row.module.rpartition(".")[2]: (row.layers, row.count) for row in made.rows} == {
        "qkv_proj": (32, 6_291_456),
        "o_proj": (32, 3_145_728),
        "gate_up_proj": (32, 9_961_472),
        "down_proj": (32, 5_767_168),
    }
    assert made.trainable == 25_165_824
    assert made.total == 3_821_079_552 + 25_165_824
    assert made.share == made.trainable / made.total
    assert made.rows[0].shapes == {"lora_A": (16, 8192), "lora_B": (3072, 16)}  # of one layer's down_proj


def test_what_the_llama_names_adapt_of_it(abstract_phi3_mini):
    assert table(abstract_phi3_mini, r=16, target_modules=["o_proj", "down_proj"]).trainable == 8_912_896


def test_embedding_and_head(abstract_phi3_mini):
    made = table(abstract_phi3_mini, r=16, target_modules=["embed_tokens", "lm_head"])
    assert [(row.layers, row.count) for row in made.rows] == [(1, 16 * (32064 + 3072))] * 2


def test_full_fine_tuning(abstract_phi3_mini):
    made = parameter_table(abstract_phi3_mini, None)
    assert made.trainable == made.total == 3_821_079_552
    assert ("model.layers.self_attn.qkv_proj", 32, {"weight": (9216, 3072)}) in [
        (row.module, row.layers, row.shapes) for row in made.rows
    ]


def test_printed(abstract_phi3_mini):
    lines = format_parameter_table(table(abstract_phi3_mini, r=16)).splitlines()
    assert lines[0].split() == ["trainable", "module", "layers", "shapes", "parameters"]
    assert "model.layers.self_attn.qkv_proj      32  lora_A 16×3072, lora_B 9216×16    6,291,456" in lines
    assert lines[-1] == "25,165,824 of 3,846,245,376 parameters train (0.65%)"
    assert len({len(line) for line in lines[:-1]}) == 1
