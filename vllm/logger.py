"""Logging: one line a message on stderr (stdout belongs to the program), the level from VLLM_LOGGING_LEVEL.

logger = init_logger(__name__)
logger.warning_once("Said once a process, however often the line is reached.")
"""

import logging
import sys
from typing import Any

from vllm import envs

_FORMAT = "%(levelname)s %(asctime)s [%(filename)s:%(lineno)d] %(message)s"
_DATE = "%m-%d %H:%M:%S"
_said: set[tuple[int, str, tuple]] = set()


class VllmLogger(logging.LoggerAdapter):
    """A logger that can also say something only once. Once means once for the same words: other arguments are other words."""

    def info_once(self, message: str, *args: Any) -> None:
        self._once(logging.INFO, message, args)

    def warning_once(self, message: str, *args: Any) -> None:
        self._once(logging.WARNING, message, args)

    def _once(self, level: int, message: str, args: tuple) -> None:
        key = (level, message, tuple(map(str, args)))
        if self.isEnabledFor(level) and key not in _said:
            _said.add(key)
            self.log(level, message, *args, stacklevel=3)  # 3: report the caller's line, not this one


def _configure() -> None:
    root = logging.getLogger("vllm")
    if any(getattr(handler, "_vllm", False) for handler in root.handlers):
        return
    handler = logging.StreamHandler(sys.stderr)
    handler._vllm = True
    handler.setFormatter(logging.Formatter(_FORMAT, _DATE))
    root.addHandler(handler)
    root.setLevel(envs.VLLM_LOGGING_LEVEL)
    root.propagate = False  # an application with its own root handler would print every line twice


def init_logger(name: str) -> VllmLogger:
    _configure()
    return VllmLogger(logging.getLogger(name), {})
