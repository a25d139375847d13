"""The version, in one place: pyproject.toml, `vllm --version` and the /version route all read it."""

__version__ = "0.1.0"
