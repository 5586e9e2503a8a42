"""The generators of the demo's chat set, and of what its base model was trained on."""
