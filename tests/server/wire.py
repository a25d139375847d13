"""A client small enough to have a thousand of: one HTTP/1.1 request a connection, read as it comes."""

import asyncio
import json
from dataclasses import dataclass, field

DONE = "[DONE]"


@dataclass
class Answer:
    """What came back. `events` are those of a stream, without its [DONE], of which `complete` tells."""

    status: int
    headers: dict[str, str]
    body: bytes = b""
    events: list[dict] = field(default_factory=list)
    complete: bool = False

    @property
    def json(self) -> dict:
        return json.loads(self.body)

    @property
    def text(self) -> str:
        """The text of a streamed choice."""
        choices = [choice for event in self.events for choice in event.get("choices", ())]
        return "".join(c["text"] if "text" in c else c["delta"].get("content", "") for c in choices)


def request_bytes(method: str, path: str, body: bytes = b"", **headers: str) -> bytes:
    """A request that closes its connection."""
    lines = [f"{method} {path} HTTP/1.1", "Host: 127.0.0.1", "Connection: close"]
    if body:
        lines += ["Content-Type: application/json", f"Content-Length: {len(body)}"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    return "\r\n".join([*lines, "", ""]).encode() + body


async def read_head(reader: asyncio.StreamReader) -> Answer:
    """The status and the headers."""
    first, *lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").strip().split("\r\n")
    headers = dict(line.split(": ", 1) for line in lines)
    return Answer(int(first.split()[1]), {name.lower(): value for name, value in headers.items()})


async def read_body(reader: asyncio.StreamReader, answer: Answer) -> Answer:
    """The rest, whether its length is given or it comes in chunks."""
    if answer.headers.get("transfer-encoding") != "chunked":
        answer.body = await reader.read()
        return answer
    pieces = []
    while size := int(await reader.readuntil(b"\r\n"), 16):
        pieces.append((await reader.readexactly(size + 2))[:-2])
    answer.body = b"".join(pieces)
    if answer.headers["content-type"].startswith("text/event-stream"):
        *events, last = [item.removeprefix("data: ") for item in answer.body.decode().strip().split("\n\n")]
        answer.complete = last == DONE
        answer.events = [json.loads(item) for item in (events if answer.complete else [*events, last])]
    return answer


async def post(port: int, path: str, body: dict) -> Answer:
    """One POST and its whole answer."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(request_bytes("POST", path, json.dumps(body).encode()))
        return await read_body(reader, await read_head(reader))
    finally:
        writer.close()


async def post_all(port: int, path: str, bodies: list[dict]) -> list[Answer]:
    """All of them at once; the answers in the order of the bodies."""
    return await asyncio.gather(*(post(port, path, body) for body in bodies))
