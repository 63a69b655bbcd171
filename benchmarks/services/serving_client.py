"""A client that costs little: HTTP/1.1 on kept connections, one request's bytes made once. Part of serving.py.

It shares the machine with the service it loads, so it must not be what is measured.
"""

import asyncio
import contextlib
import json
import random
from collections import deque
from time import perf_counter
from typing import Final, NamedTuple

import numpy as np

from chexnet_deploy.images.preprocessing import Pixels

_LATE: Final = 30.0  # seconds after which an answer isn't waited for


class Sample(NamedTuple):
    """One request: its status, 0 where the connection failed, and the time from when it was due to its whole answer."""

    status: int
    latency_ms: float


def infer_request(model: str, pixels: Pixels) -> bytes:
    """Return a whole binary inference request for logits of pixels uint8 [N, 1, S, S]."""
    tensor = {"name": "pixels", "datatype": "UINT8", "shape": list(pixels.shape)}
    header = json.dumps(
        {
            "inputs": [{**tensor, "parameters": {"binary_data_size": pixels.nbytes}}],
            "outputs": [{"name": "logits", "parameters": {"binary_data": True}}],
        }
    ).encode()
    return (
        f"POST /v2/models/{model}/infer HTTP/1.1\r\nHost: bench\r\nContent-Length: {len(header) + pixels.nbytes}\r\n"
        f"Inference-Header-Content-Length: {len(header)}\r\n\r\n"
    ).encode() + (header + pixels.tobytes())


class Client:
    """Connections to one port, kept and used again."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._free: deque[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = deque()

    async def ask(self, request: bytes, due_s: float | None = None) -> tuple[Sample, bytes]:
        """Send one request; return how it went and the answer's body."""
        began_s = perf_counter() if due_s is None else due_s
        try:
            status, body = await asyncio.wait_for(self._ask(request), _LATE)
        except (OSError, EOFError, ValueError, asyncio.TimeoutError):
            status, body = 0, b""
        return Sample(status, (perf_counter() - began_s) * 1000.0), body

    async def _connection(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        while self._free:
            reader, writer = self._free.pop()
            if not reader.at_eof():
                return reader, writer
            writer.close()  # the server ended it while it was idle
        return await asyncio.open_connection("127.0.0.1", self._port)

    async def _ask(self, request: bytes) -> tuple[int, bytes]:
        pair = await self._connection()
        reader, writer = pair
        try:
            writer.write(request)
            head = (await reader.readuntil(b"\r\n\r\n")).lower()
            length = int(head.split(b"\r\ncontent-length:", 1)[1].split(b"\r\n", 1)[0])
            body = await reader.readexactly(length)
        except BaseException:
            writer.transport.abort()
            raise
        if b"connection: close" in head:
            writer.close()
        else:
            self._free.append(pair)
        return int(head[9:12]), body

    async def close(self) -> None:
        """Close all connections."""
        for _, writer in self._free:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()


async def closed_loop(port: int, request: bytes, *, clients: int, seconds: float) -> tuple[list[Sample], float]:
    """Let so many clients ask one request after another; return the samples and the answers a second."""
    client, samples = Client(port), list[Sample]()
    began_s = perf_counter()

    async def ask() -> None:
        while perf_counter() - began_s < seconds:
            samples.append((await client.ask(request))[0])

    await asyncio.gather(*(ask() for _ in range(clients)))
    rate = sum(sample.status == 200 for sample in samples) / (perf_counter() - began_s)
    await client.close()
    return samples, rate


def due_times_s(*, rate: float, seconds: float, seed: int | None) -> list[float]:
    """Return when requests are due, from the start on: at random moments (Poisson), or without a seed at even distances."""
    rng, due_s, found = random.Random(seed), 0.0, list[float]()
    while True:
        due_s += 1.0 / rate if seed is None else rng.expovariate(rate)
        if due_s > seconds:
            return found
        found.append(due_s)


async def open_loop(port: int, request: bytes, *, rate: float, seconds: float, seed: int | None) -> list[Sample]:
    """Send requests whatever becomes of those before; a late start counts as latency.

    Args:
        port: of the service.
        request: sent again and again.
        rate: requests a second.
        seconds: for how long.
        seed: of random moments (Poisson); None sends at even distances.
    """
    client = Client(port)
    tasks, samples = set[asyncio.Task[None]](), list[Sample]()

    async def ask(due_s: float) -> None:
        samples.append((await client.ask(request, due_s))[0])

    began_s = perf_counter()
    for each_s in due_times_s(rate=rate, seconds=seconds, seed=seed):
        due_s = began_s + each_s
        await asyncio.sleep(max(0.0, due_s - perf_counter()))
        task = asyncio.ensure_future(ask(due_s))
        tasks.add(task)
        task.add_done_callback(tasks.discard)
    await asyncio.gather(*tasks)
    await client.close()
    return samples


async def attack(port: int, *, peers: int, seconds: float) -> list[float]:
    """Open connections that send a header or a body a byte a second; return the seconds each was let live."""

    async def trickle(number: int) -> float:
        head = b"POST /predict HTTP/1.1\r\nHost: slow\r\n"
        start = head + (b"X-Slow: " if number % 2 else b"Content-Length: 100000\r\n\r\n")
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        began_s = perf_counter()
        writer.write(start)
        ended = asyncio.ensure_future(reader.read())
        while perf_counter() - began_s < seconds and not ended.done():
            await asyncio.wait({ended}, timeout=1.0)
            with contextlib.suppress(OSError):
                writer.write(b"x")
        lived_s = perf_counter() - began_s
        writer.transport.abort()
        with contextlib.suppress(OSError, asyncio.CancelledError):
            ended.cancel()
            await ended
        return lived_s

    return list(await asyncio.gather(*(trickle(number) for number in range(peers))))


def percentile_ms(samples: list[Sample], q: float, *statuses: int) -> float:
    """Return the q-th percentile of the latencies of these statuses, NaN where there are none."""
    chosen = [sample.latency_ms for sample in samples if sample.status in statuses]
    return float(np.percentile(chosen, q)) if chosen else float("nan")
