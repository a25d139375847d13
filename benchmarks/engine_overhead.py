"""What a token costs on its way from the engine core to whoever reads `AsyncLLM.generate`, without a model.

    python benchmarks/engine_overhead.py [--streams 1 256] [--tokens N] [--core slow|paced|fast] [--no-detokenize] [--uvloop]

Prints CPU microseconds a token, of the front end's process (event loop, detokenising, metrics) and of the core's (its loop and
the sending; the stub's own work is among it), and how fast tokens came.
"""

from __future__ import annotations

import argparse
import asyncio
import time

import psutil

from vllm import EngineArgs, SamplingParams
from vllm.benchmarks.stub_core import PacedStubCore, SlowStubCore, StubCore
from vllm.config.checkpoint import TINY
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.async_llm import AsyncLLM

CORES = {"fast": StubCore, "paced": PacedStubCore, "slow": SlowStubCore}


def cpu_seconds(process: psutil.Process) -> float:
    times = process.cpu_times()
    return times.user + times.system


async def read(engine: AsyncLLM, name: str, params: SamplingParams) -> tuple[int, int]:
    """(tokens, outputs) of one stream."""
    tokens = outputs = 0
    async for output in engine.generate([1, 2, 3], params, name):
        tokens += len(output.outputs[0].token_ids)
        outputs += 1
    return tokens, outputs


async def measure(engine: AsyncLLM, streams: int, params: SamplingParams) -> str:
    """Run `streams` requests at once and describe what they cost."""
    me, [core] = psutil.Process(), psutil.Process().children()
    await asyncio.gather(*(read(engine, f"warm-{i}", params.clone(max_tokens=8)) for i in range(streams)))
    before = [cpu_seconds(me), cpu_seconds(core), time.perf_counter()]
    results = await asyncio.gather(*(read(engine, f"run-{i}", params) for i in range(streams)))
    front, back, seconds = (
        now - then for now, then in zip([cpu_seconds(me), cpu_seconds(core), time.perf_counter()], before, strict=True)
    )
    tokens, outputs = (sum(column) for column in zip(*results))
    assert tokens == streams * params.max_tokens
    front, back = front / tokens * 1e6, back / tokens * 1e6
    return (
        f"{streams:5d} streams  front end {front:6.1f} us/token  core {back:6.1f} us/token  together {front + back:6.1f}  "
        f"{tokens / seconds:9.0f} tokens/s  {seconds / params.max_tokens * 1e3:6.2f} ms/step  {tokens / outputs:.2f} tokens/output"
    )


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 16, 256])
    parser.add_argument("--tokens", type=int, default=1000, help="a stream")
    parser.add_argument("--core", choices=CORES, default="paced")
    parser.add_argument("--no-detokenize", action="store_true")
    parser.add_argument("--uvloop", action="store_true", help="the event loop that `vllm serve` uses")
    return parser.parse_args()


async def main(args: argparse.Namespace) -> None:
    config = EngineArgs(str(TINY), device="cpu").create_engine_config()
    engine = AsyncLLM(config, core_class=CORES[args.core])
    await engine.start()
    params = SamplingParams(
        max_tokens=args.tokens,
        output_kind=RequestOutputKind.DELTA,
        detokenize=not args.no_detokenize,
        skip_special_tokens=False,
    )
    for streams in args.streams:
        print(await measure(engine, streams, params), flush=True)
    engine.shutdown()


if __name__ == "__main__":
    args = parse()
    if args.uvloop:
        import uvloop

        uvloop.run(main(args))
    else:
        asyncio.run(main(args))
