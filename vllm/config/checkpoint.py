"""From what a user calls a model to a folder on disk, and from that folder to its parsed config.json."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from vllm.config.hf_config import HFConfig, parse_hf_config

ASSETS = Path(__file__).resolve().parent.parent / "assets"
TINY = ASSETS / "tiny-qwen3_5-moe"

_CONFIG_FILES = ["*.json", "*.txt", "*.jinja"]  # configs, tokenizer, chat template
_ALL_FILES = [*_CONFIG_FILES, "*.safetensors"]


def preset_names() -> list[str]:
    """What may follow "preset:"."""
    return sorted(["tiny", *(path.parent.name for path in (ASSETS / "presets").glob("*/config.json"))])


def resolve_model(
    model: str, revision: str | None = None, download_dir: str | None = None, *, weights: bool = True
) -> Path:
    """The folder that holds a model's files.

    Args:
        model: a folder; "preset:NAME", a config.json that comes with the program (only "preset:tiny" has weights);
            or a model's id on the Hugging Face hub, which is downloaded or found in the hub's cache.
        revision: branch, tag or commit on the hub.
        download_dir: the hub's cache folder.
        weights: False leaves the weights of a hub model where they are.

    Raises:
        FileNotFoundError: no such folder, no config.json in it, or the hub cannot be reached.
        ValueError: no such preset or no such model on the hub.
    """
    if model.startswith("preset:"):
        name = model.removeprefix("preset:")
        if name not in preset_names():
            raise ValueError(f"no preset {name!r}; there are: {', '.join(preset_names())}")
        folder = TINY if name == "tiny" else ASSETS / "presets" / name
    elif Path(model).expanduser().is_dir():
        folder = Path(model).expanduser()
    elif _looks_like_a_path(model):
        raise FileNotFoundError(f"--model {model}: no such folder")
    else:
        folder = _download(model, revision, download_dir, weights)
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"--model {model}: no config.json in {folder}")
    return folder


def load_hf_config(folder: Path, overrides: dict[str, Any] | None = None) -> HFConfig:
    """Parse a folder's config.json. End-of-sequence ids of generation_config.json, where there is one, are added:
    published chat models stop at <|im_end|>, which only that file names."""
    path = folder / "config.json"
    generation = folder / "generation_config.json"
    config = parse_hf_config(read_json(path), overrides, source=str(path))
    if not generation.is_file():
        return config
    extra = read_json(generation).get("eos_token_id")
    extra = extra if isinstance(extra, list) else [] if extra is None else [extra]
    eos = tuple(dict.fromkeys([*extra, *config.eos_token_ids]))
    return replace(config, eos_token_ids=eos)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; ValueError names the file and the place where it is broken."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected a JSON object")
    return value


def _looks_like_a_path(model: str) -> bool:
    return model.startswith(("/", ".", "~")) or model.count("/") != 1


def _download(model: str, revision: str | None, download_dir: str | None, weights: bool) -> Path:
    from huggingface_hub import snapshot_download  # here, because only hub ids need it
    from huggingface_hub.constants import HF_HUB_OFFLINE
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    at = f" at revision {revision}" if revision else ""
    try:
        patterns = _ALL_FILES if weights else _CONFIG_FILES
        return Path(snapshot_download(model, revision=revision, cache_dir=download_dir, allow_patterns=patterns))
    except GatedRepoError:
        raise ValueError(
            f"--model {model}: the hub wants a login for it; run `hf auth login` or set HF_TOKEN"
        ) from None
    except RepositoryNotFoundError:
        raise ValueError(
            f"--model {model}: neither a folder here nor a model on the hub (private ones need HF_TOKEN)"
        ) from None
    except RevisionNotFoundError:
        raise ValueError(f"--revision {revision}: {model} has no such revision on the hub") from None
    except HFValidationError:
        raise FileNotFoundError(f"--model {model}: neither a folder nor a valid hub id") from None
    except (LocalEntryNotFoundError, OfflineModeIsEnabled, HfHubHTTPError, ConnectionError, TimeoutError) as error:
        reason = "HF_HUB_OFFLINE is set" if HF_HUB_OFFLINE else (str(error).splitlines() or [type(error).__name__])[0]
        raise FileNotFoundError(
            f"--model {model}{at}: no such folder, not in the hub's cache, and the hub cannot be reached ({reason})"
        ) from None
