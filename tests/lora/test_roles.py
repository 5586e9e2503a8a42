"""What an array is, told by its place in the tree."""

from jax.tree_util import DictKey as Key
from jax.tree_util import GetAttrKey as At

from phi3_jax.lora.roles import is_embedding_adapter, is_embedding_table, stack_axes


def test_places():
    table = (Key("model"), Key("model"), Key("embed_tokens"), Key("weight"))
    adapter = (Key("lora"), At("adapters"), Key("model"), Key("embed_tokens"), At("lora_A"))
    layer = (Key("lora"), At("adapters"), Key("model"), Key("layers"), Key("mlp"), Key("down_proj"), At("lora_A"))
    assert [stack_axes(path) for path in (table, adapter, layer)] == [0, 0, 1]
    assert [is_embedding_table(path) for path in (table, adapter, layer)] == [True, False, False]
    assert [is_embedding_adapter(path) for path in (table, adapter, layer)] == [False, True, False]
