"""Where every array of a run lies, by its name and shape."""

from jax.sharding import AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P

from phi3_jax.parallel.layout import adapter_sharding, batch_sharding, weight_sharding
from phi3_jax.parallel.mesh import AXES

MESH = AbstractMesh((2, 2, 2, 1), AXES, (AxisType.Auto,) * 4)


def test_by_name_and_shape():
    down = ("model", "layers", "mlp", "down_proj")
    assert weight_sharding(down, (3, 8, 8), MESH).spec == P(None, ("fsdp",), ("tensor",))
    assert weight_sharding(("lm_head", "weight"), (8, 8), MESH).spec == P(("tensor", "fsdp"), None)
    assert weight_sharding(("model", "norm", "weight"), (8,), MESH).spec == P()
    assert adapter_sharding((3, 2, 16), MESH).spec == P(None, None, ("fsdp",))
    assert batch_sharding(MESH, 3).spec == P(None, ("data", "fsdp"), "context")


def test_a_vocabulary_that_the_devices_do_not_divide_is_cut_by_its_columns():
    def cut(names, shape, **sizes):
        mesh = AbstractMesh(tuple(sizes.get(axis, 1) for axis in AXES), AXES, (AxisType.Auto,) * 4)
        return weight_sharding(names, shape, mesh).spec

    head, embedding = ("lm_head", "weight"), ("model", "embed_tokens", "weight")
    assert cut(head, (32064, 3072), fsdp=64) == P(("fsdp",), None)
    assert cut(head, (32064, 3072), fsdp=256) == P(None, ("fsdp",))
    assert cut(embedding, (200064, 3072), data=2, fsdp=256, context=2) == P(None, ("fsdp", "context"))
    assert cut(embedding, (200064, 3072), fsdp=128, context=2) == P(("fsdp",), ("context",))
    assert cut(head, (32064, 3072), fsdp=256, tensor=2) == P(("tensor",), ("fsdp",))
    assert cut(head, (33, 33), fsdp=2) == P(None, None)  # nothing divides: whole
    # Rows of other weights are widths, and columns of quantised ones no numbers of their own.
    assert cut(("model", "layers", "qkv_proj"), (3, 33, 8), fsdp=2) == P(None, None, None)
