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
