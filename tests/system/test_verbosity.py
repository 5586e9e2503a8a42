"""How much is said."""

from phi3_jax.system.verbosity import at_verbosity, verbosity


def test_a_level_holds_within_and_none_changes_nothing():
    with at_verbosity("quiet"):
        with at_verbosity(None):
            assert verbosity() == "quiet"
        with at_verbosity("verbose"):
            assert verbosity() == "verbose"
        assert verbosity() == "quiet"
    assert verbosity() == "normal"
