"""Fixtures of the asynchronous engine's tests."""

import tempfile

import pytest


@pytest.fixture
def own_temp(monkeypatch, tmp_path_factory):
    """A temporary folder with a short name that no other test's engine uses."""
    tmp_path_factory.getbasetemp()  # pytest's own folder must not be made in it
    with tempfile.TemporaryDirectory(prefix="t-") as folder:
        monkeypatch.setenv("TMPDIR", folder)
        monkeypatch.setattr(tempfile, "tempdir", folder)
        yield folder
