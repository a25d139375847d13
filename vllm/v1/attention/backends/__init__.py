"""Builders of the metadata that stateful layers read from the forward context."""
