"""--config FILE: a YAML file of flags, put before those of the command line, which therefore win."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def with_config_file(words: list[str]) -> list[str]:
    """The command line `words` with the flags of its --config file before them; --config itself stays.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it holds something else than flags and their values.
    """
    files = [
        word.partition("=")[2] if "=" in word else (words[i + 1] if i + 1 < len(words) else "")
        for i, word in enumerate(words)
        if word.partition("=")[0] == "--config"
    ]
    if not files or not files[-1]:
        return words
    if len(files) > 1:
        raise ValueError(f"--config is given {len(files)} times; give one file")
    return [*_read(files[0]), *words]


def _read(name: str) -> list[str]:
    import yaml

    path = Path(name).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"--config {name}: no such file")
    try:
        values = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"--config {name}: not YAML: {error}") from None
    if values is None:
        return []
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise ValueError(f"--config {name}: expected flags and their values, such as max-model-len: 4096")
    if "config" in values:
        raise ValueError(f"--config {name}: a file cannot name another")
    return [word for key, value in values.items() for word in _words(key, value)]


def _words(key: str, value: Any) -> list[str]:
    name = "--" + key.lstrip("-").replace("_", "-")
    if value is None:
        return []
    if isinstance(value, bool):
        return [name if value else "--no-" + name[2:]]
    if isinstance(value, dict) or (isinstance(value, list) and not value):
        return [f"{name}={json.dumps(value)}"]
    if isinstance(value, list):
        return [f"{name}={item}" for item in value]
    return [f"{name}={value}"]
