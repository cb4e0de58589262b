"""Part of the mock."""
