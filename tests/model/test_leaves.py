"""A model's leaves."""

from phi3_jax.model.leaves import abstract_model, fused_rows, model_leaves
from tests.helpers.models import smallest_model


def test_shapes_are_those_of_the_arrays_and_fused_rows_cover_them():
    model = smallest_model()
    shapes = {path: leaf.get_value().shape for path, leaf in model_leaves(model).items()}
    abstract = {path: leaf.get_value().shape for path, leaf in model_leaves(abstract_model(model.config)).items()}
    assert shapes == abstract
    path = ("model", "layers", "self_attn", "qkv_proj", "weight")
    rows = fused_rows(model, path)
    assert [part.stop - part.start for part in rows] == [16, 8, 8]
    assert rows[-1].stop == shapes[path][1]
    assert fused_rows(model, ("model", "layers", "mlp", "down_proj", "weight")) is None
