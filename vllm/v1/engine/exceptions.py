"""What can go wrong between a request and its engine, apart from the request itself (that is a ValueError)."""


class EngineDeadError(RuntimeError):
    """The engine has ended and answers nothing any more. The message says why."""


class EngineStalledError(RuntimeError):
    """The engine is there and does not get on. It may again; the message says how long it has not."""


class EngineOverloadedError(RuntimeError):
    """The engine takes no further request now: its queue is full, or it is being shut down. Nothing was queued.

    Args:
        retry_after: seconds after which to try again.
    """

    def __init__(self, message: str, retry_after: int = 1) -> None:
        super().__init__(message)
        self.retry_after = retry_after
