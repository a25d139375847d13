"""Decide who runs in the next step."""
