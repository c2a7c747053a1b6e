"""Time the requests of `slrmerge eval` against the plain openai client, at a loopback server that answers at once.

Both send the same requests, as many at a time; slrmerge also limits, checks and records what it gets, in samples.jsonl.
Start-up and the report are not counted. A real server takes seconds for an answer: what counts is that slrmerge sends
requests faster than any server answers them.

    python benchmarks/eval.py --requests 5000 --runs 3
"""

import argparse
import asyncio
import json
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path

from openai import AsyncOpenAI

from slrmerge.evaluation.models import ServerAddress
from slrmerge.evaluation.requesting import request_missing
from slrmerge.evaluation.samples import SampleFile, Settings
from slrmerge.evaluation.server import ServerModel
from slrmerge.io.progress import Progress

SAMPLES = 100
"""Samples of each prompt."""

ANSWER = "An answer of about as many words as a short one has. " * 4


@contextmanager
def serving(content: str = ANSWER) -> Iterator[str]:
    """The URL of a server in another process that answers everything with `content`, for the block."""
    os.environ["NO_PROXY"] = "127.0.0.1"
    pipe, other = multiprocessing.Pipe()
    server = multiprocessing.get_context("spawn").Process(target=serve, args=(other, content), daemon=True)
    server.start()
    yield f"http://127.0.0.1:{pipe.recv()}/v1"
    server.terminate()


def serve(pipe: Connection, content: str) -> None:
    """A server that reads a request and answers it, whatever it is; tells its port."""
    choice = {"index": 0, "message": {"role": "assistant", "content": content}, "finish_reason": "stop"}
    completion = {"id": "1", "object": "chat.completion", "created": 1, "model": "m", "choices": [choice]}
    models = {"object": "list", "data": [{"id": "m", "object": "model", "created": 1, "owned_by": "m"}]}
    body = json.dumps(completion | models).encode()  # of both, the client reads what it asked for
    answer = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                await reader.readexactly(int(head.lower().partition(b"content-length:")[2].split(b"\r\n")[0] or 0))
                writer.write(answer)
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()

    async def listen() -> None:
        server = await asyncio.start_server(connected, "127.0.0.1", 0)
        pipe.send(server.sockets[0].getsockname()[1])
        await server.serve_forever()

    asyncio.run(listen())


def ours(url: str, requests: int, concurrency: int) -> float:
    """Requests per second of slrmerge."""
    model = ServerModel(ServerAddress("m", url), concurrency=concurrency, timeout_s=60)
    prompts = {str(number): f"Name a river, number {number}." for number in range(requests // SAMPLES)}
    settings = Settings("m", temperature=1.0, min_p=0.1, max_tokens=64)
    with tempfile.TemporaryDirectory() as folder, SampleFile(Path(folder) / "samples.jsonl") as file:
        start = time.perf_counter()
        request_missing(model, "m", prompts, file, settings, samples=SAMPLES, progress=Progress())
        elapsed_s = time.perf_counter() - start
        assert len(file) == requests
    return requests / elapsed_s


def theirs(url: str, requests: int, concurrency: int) -> float:
    """Requests per second of the openai client alone."""

    async def worker(client: AsyncOpenAI, numbers: list[int]) -> None:
        while numbers:
            number = numbers.pop()
            await client.chat.completions.create(
                model="m",
                messages=[{"role": "user", "content": f"Name a river, number {number // SAMPLES}."}],
                temperature=1.0,
                max_tokens=64,
                seed=number,
                extra_body={"min_p": 0.1},
            )

    async def work() -> None:
        numbers = list(range(requests))
        async with AsyncOpenAI(base_url=url, api_key="none") as client, asyncio.TaskGroup() as group:
            for _ in range(concurrency):
                group.create_task(worker(client, numbers))

    start = time.perf_counter()
    asyncio.run(work())
    return requests / (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=5000, help=f"a multiple of {SAMPLES} (default 5000)")
    parser.add_argument("--concurrency", type=int, default=16, help="requests at a time (default 16)")
    parser.add_argument("--runs", type=int, default=3, help="counted runs of each (default 3)")
    chosen = parser.parse_args()
    if chosen.requests % SAMPLES:
        parser.error(f"--requests is not a multiple of {SAMPLES}")
    with serving() as url:
        for measure in (ours, theirs):  # uncounted
            measure(url, SAMPLES, chosen.concurrency)
        size = chosen.requests, chosen.concurrency
        pairs = [(ours(url, *size), theirs(url, *size)) for _ in range(chosen.runs)]
    ratios = [a / b for a, b in pairs]
    print("| what | slrmerge / rival, median (range) | slrmerge | rival |\n|---|---|---|---|")
    print(
        f"| {chosen.requests:,} requests, {chosen.concurrency} at a time / openai client "
        f"| {statistics.median(ratios):.2f} ({min(ratios):.2f}–{max(ratios):.2f}) "
        f"| {statistics.median(a for a, _ in pairs):.0f}/s | {statistics.median(b for _, b in pairs):.0f}/s |"
    )


if __name__ == "__main__":
    main()
