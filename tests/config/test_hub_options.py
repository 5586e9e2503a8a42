"""How the hub is asked."""

import pytest

from phi3_jax.config.hub_options import Hub, is_hub_id


@pytest.mark.parametrize(
    ("name", "expected"), [("owner/name-1.5", True), ("name", True), ("../name", False), ("a/b/c", False), ("", False)]
)
def test_ids(name, expected):
    assert is_hub_id(name) == expected


def test_another_revision_keeps_the_rest_and_a_token_is_not_shown():
    hub = Hub("main", token="hf_secret", local_files_only=True).at("v2")
    assert (hub.revision, hub.token, hub.local_files_only) == ("v2", "hf_secret", True)
    assert "secret" not in repr(hub)
