"""A conversation with a model and its adapters."""
