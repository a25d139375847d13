"""A server whose timings are known: it streams tokens at set moments and tells afterwards when it really sent them.

python known_server.py PORT FIRST_MS GAP_MS      GET /sent: [[request received, token sent, ...], ...] in seconds of time.perf_counter()

Clocks of processes on one machine are the same there, so that a client's times can be held against these.
"""

import asyncio
import json
import sys
import time

EVENT = '{"id":"cmpl-1","object":"text_completion","created":1,"model":"known","choices":[{"index":0,"text":" w","logprobs":null,"finish_reason":%s}]}'
USAGE = '{"id":"cmpl-1","choices":[],"usage":{"prompt_tokens":7,"completion_tokens":%d,"total_tokens":%d}}'
sent: list[list[float]] = []


def chunk(data: str) -> bytes:
    body = f"data: {data}\n\n".encode()
    return b"%x\r\n%s\r\n" % (len(body), body)


TOKEN, LAST = chunk(EVENT % "null"), chunk(EVENT % '"length"')


async def answer(reader, writer, first, gap):
    """Requests on one connection, one after the other."""
    loop = asyncio.get_running_loop()
    while head := await reader.readuntil(b"\r\n\r\n"):
        received = time.perf_counter()
        if head.startswith(b"GET"):
            known = json.dumps(sent if b"/sent" in head else {"data": [{"id": "known"}]}).encode()
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(known), known))
            continue
        length = int(head.lower().split(b"content-length:")[1].split(b"\r\n")[0])
        body = json.loads(await reader.readexactly(length))
        tokens = body["max_tokens"]
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n")
        start = loop.time() + first
        times = [received]
        sent.append(times)
        for i in range(tokens):
            delay = start + i * gap - loop.time()
            if delay > 0:
                await asyncio.sleep(delay)
            times.append(time.perf_counter())
            writer.write(LAST if i == tokens - 1 else TOKEN)
        writer.write(chunk(USAGE % (tokens, tokens + 7)) + chunk("[DONE]") + b"0\r\n\r\n")


async def serve(port, first, gap):
    async def handle(reader, writer):
        try:
            await answer(reader, writer, first, gap)
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()

    server = await asyncio.start_server(handle, "127.0.0.1", port)
    print("ready", flush=True)
    async with server:
        await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(serve(int(sys.argv[1]), float(sys.argv[2]) / 1e3, float(sys.argv[3]) / 1e3))
