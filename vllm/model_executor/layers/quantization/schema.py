"""What can be said against a quantization_config before any tensor is looked at, and once the modules are known."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from vllm import envs
from vllm.config.checkpoint import ASSETS
from vllm.config.quantization import QuantConfig
from vllm.logger import init_logger

logger = init_logger(__name__)

_OPTIONAL = ("visual", "mtp", "lm_head")
"""Parts that a checkpoint may lack though its recipe's list of ignored modules names them."""


def check_schema(config: dict[str, Any] | None, source: str) -> None:
    """Hold compressed-tensors' configs to that package's own schema, once each: importing it takes seconds, so that what has passed
    is remembered under VLLM_CACHE_ROOT. What the presets have, passes in the tests.

    Raises:
        ValueError: one line with the file, and the first key that is wrong.
    """
    if not config or config.get("quant_method") != "compressed-tensors":
        return
    passed = _mark_of(config)
    if passed.exists() or config in _of_presets():
        return
    from compressed_tensors.quantization import QuantizationConfig

    try:
        QuantizationConfig.model_validate(config)
    except ValueError as error:  # pydantic's, which lists every key over many lines
        first = error.errors()[0] if hasattr(error, "errors") else {"loc": (), "msg": str(error)}
        where = ".".join(str(part) for part in first["loc"])
        what = " ".join(first["msg"].split())
        raise ValueError(f"{source}: quantization_config{'.' if where else ''}{where}: {what}") from None
    try:
        passed.parent.mkdir(parents=True, exist_ok=True)
        passed.touch()
    except OSError:
        logger.debug("%s cannot be written: the configuration will be checked again", passed)


def _of_presets() -> list[dict[str, Any]]:
    """The compressed-tensors configs of published models, which many checkpoints share."""
    configs = [json.loads(file.read_text()) for file in (ASSETS / "presets").glob("*/config.json")]
    found = [config.get("quantization_config") or {} for config in configs]
    return [config for config in found if config.get("quant_method") == "compressed-tensors"]


def _mark_of(config: dict[str, Any]) -> Path:
    """The file that says that this version of the package has accepted this configuration."""
    text = json.dumps([version("compressed-tensors"), config], sort_keys=True)
    return Path(envs.VLLM_CACHE_ROOT, "checked_configs", hashlib.sha256(text.encode()).hexdigest()).expanduser()


def check_ignore_list(quant: QuantConfig | None, modules: Iterable[str]) -> None:
    """Entries that match nothing are worth a warning; a list that matches nothing at all was written for another model.

    Args:
        modules: canonical names of the checkpoint's modules.

    Raises:
        ValueError: no entry matches, and not because the checkpoint lacks a part that may be left out.
    """
    if quant is None or not quant.ignore:
        return
    unmatched = quant.unmatched([*modules, "lm_head"])
    odd = [entry for entry in unmatched if not any(part in entry for part in _OPTIONAL)]
    if not odd:
        return
    listed = ", ".join(odd[:3]) + (f" and {len(odd) - 3} more" if len(odd) > 3 else "")
    example = min((name for name in modules if name.startswith("model.layers.")), default="lm_head")
    if len(unmatched) == len(quant.ignore):
        raise ValueError(
            f"{quant.source}: quantization_config: its list of ignored modules matches none: {listed}; expected names such as {example}"
        )
    logger.warning("%s: ignored modules that are not there: %s", quant.source, listed)
