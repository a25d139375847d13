"""Every environment variable that is read, in one table: name -> (parser, default, help).

`envs.VLLM_LOGGING_LEVEL` parses os.environ when it is read, not at import, so a test (or a user's script) may set a variable at any time.
A variable is listed only while something honours it; a test holds that.
"""

import logging
import os
from collections.abc import Callable
from typing import Any, NamedTuple

_TRUE = {"1", "true", "yes", "on"}
_FALSE = {"0", "false", "no", "off", ""}


def _flag(text: str) -> bool:
    if text.strip().lower() in _TRUE:
        return True
    if text.strip().lower() in _FALSE:
        return False
    raise ValueError("expected 0 or 1")


def _choice(*allowed: str, fold: Callable[[str], str] = str.lower) -> Callable[[str], str]:
    def parse(text: str) -> str:
        value = fold(text.strip())
        if value not in allowed:
            raise ValueError(f"expected one of {', '.join(allowed)}")
        return value

    return parse


class EnvVar(NamedTuple):
    parse: Callable[[str], Any]
    default: str  # as the user would write it, so that help texts need no second spelling
    help: str


VARIABLES: dict[str, EnvVar] = {
    "VLLM_LOGGING_LEVEL": EnvVar(
        _choice("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL", fold=str.upper),
        "INFO",
        "Messages below this level are not logged.",
    ),
    "VLLM_ENABLE_V1_MULTIPROCESSING": EnvVar(
        _flag, "1", "0 runs the engine of a server in a thread of the server's process instead of a process of its own."
    ),
    "VLLM_API_KEY": EnvVar(str, "", "Key that the server asks of requests to /v1 routes, where --api-key gives none."),
    "VLLM_SERVER_DEV_MODE": EnvVar(
        _flag, "0", "1 adds the routes /reset_prefix_cache, /start_profile and /stop_profile, which ask for no key."
    ),
    "VLLM_SLEEP_WHEN_IDLE": EnvVar(
        _flag,
        "0",
        "1 lets the engine sleep while it waits for the GPU, instead of asking all the time: it frees a processor core and costs a little latency.",
    ),
    "VLLM_CACHE_ROOT": EnvVar(str, "~/.cache/vllm", "Folder for what is written and may be deleted at any time."),
    "VLLM_TORCH_PROFILER_DIR": EnvVar(str, "", "Folder for profiles, where VLLM_CACHE_ROOT/profiles will not do."),
    "VLLM_ENABLE_FLA_PACKED_RECURRENT_DECODE": EnvVar(
        _flag, "1", "0 makes --gdn-decode auto mean unpacked: one kernel for each stage of a decode step."
    ),
    "VLLM_USE_LAYERNAME": EnvVar(
        _flag, "1", "0 names layers by plain strings in custom ops, so that torch.compile makes a graph for each layer."
    ),
    "VLLM_TARGET_DEVICE": EnvVar(
        _choice("auto", "cuda", "cpu"),
        "auto",
        "Read by setup.py: cuda fails where the CUDA kernels cannot be built, cpu never tries, auto builds them where it can.",
    ),
}


def __getattr__(name: str) -> Any:
    variable = VARIABLES.get(name)
    if variable is None:
        raise AttributeError(f"vllm reads no environment variable {name!r}")
    text = os.environ.get(name, variable.default)
    try:
        return variable.parse(text)
    except ValueError as error:
        raise ValueError(f"environment variable {name}={text!r}: {error}") from None


def __dir__() -> list[str]:
    return sorted({*globals(), *VARIABLES})


def unknown() -> list[str]:
    return sorted(name for name in os.environ if name.startswith("VLLM_") and name not in VARIABLES)


_warned = False


def warn_unknown() -> None:
    """Called when an engine starts: names, in one warning a process, the VLLM_* variables that change nothing here."""
    global _warned
    names = unknown()
    if names and not _warned:
        _warned = True
        logging.getLogger("vllm.envs").warning("Ignored, because vllm does not read it: %s", ", ".join(names))
