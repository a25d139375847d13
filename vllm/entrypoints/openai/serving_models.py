"""/v1/models: what is served."""

from __future__ import annotations

import time
from typing import Any

from vllm.entrypoints.openai.context import ServerContext


class ModelServing:
    """The routes, on one server's settings."""

    def __init__(self, context: ServerContext) -> None:
        self.context = context
        self._created = int(time.time())

    def list(self) -> dict[str, Any]:
        """Every name that requests may use."""
        return {"object": "list", "data": [self._card(name) for name in self.context.model_names]}

    def one(self, name: str) -> dict[str, Any]:
        """One of them. Raises APIError 404 for a name that is not served."""
        self.context.check_model(name)
        return self._card(name)

    def _card(self, name: str) -> dict[str, Any]:
        return {
            "id": name,
            "object": "model",
            "created": self._created,
            "owned_by": "vllm",
            "root": self.context.config.model_config.model,
            "parent": None,
            "max_model_len": self.context.max_model_len,
        }
