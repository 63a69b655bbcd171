"""Stand between the network and the HTTP server: how many may connect, how long they may take, how much they may make us hold.

uvicorn closes a connection that is idle between requests, and nothing else: a peer that sends a header or a body a byte a
minute, or never reads its answer, keeps its place for ever. Here every phase has an end. Where all places are taken, or all
memory for bodies and unread answers, who has made no progress for the longest gives way, never the newest; a request being
answered gives way to none.

A proxy's buffers and deadlines do the most of it, and uvicorn's own settings too little: with `limit_concurrency` and
`timeout_keep_alive` alone, 200 peers that send a byte a second lived for all of 15 s (here 10), and 708 MiB of bodies, one byte
short of whole, took 723 MiB of memory (here 484).
"""

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from enum import Enum
from time import monotonic
from typing import Any, Final, TypeAlias

from uvicorn.protocols.http.h11_impl import H11Protocol

from chexnet_deploy.serving.http.config import MIB, ServeConfig

Address: TypeAlias = tuple[str, int]
Scope: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send: TypeAlias = Callable[[MutableMapping[str, Any]], Awaitable[None]]

# Longer than proxies keep theirs (nginx: 60 s), or they would send on connections that are ending. Idle ones give way anyway.
IDLE_S: Final = 75
_LOOK_EVERY_S: Final = 0.2


class Phase(str, Enum):
    """What a connection is at."""

    IDLE = "idle"  # between two requests
    RECEIVING = "receiving"  # from connecting, or a request's first byte, to its last
    ANSWERING = "answering"
    UNREAD = "unread"  # the answer is out, and the peer hasn't taken all of it


@dataclass(slots=True, eq=False)
class Connection:
    """One peer's."""

    transport: asyncio.Transport
    address: Address
    since_s: float
    phase: Phase = Phase.RECEIVING
    n_requests: int = 0
    held_bytes: int = 0


class Guard:
    """Every open connection; for one event loop.

    Args:
        config: limits and deadlines.
        on_end: called with the reason a connection was ended for: "deadline" or "gave-way".
    """

    def __init__(self, config: ServeConfig, on_end: Callable[[str], None]) -> None:
        self._max_connections = config.max_connections
        self._max_held_bytes = config.max_held_mib * MIB
        self._deadlines_s = {
            Phase.IDLE: IDLE_S,
            Phase.RECEIVING: config.receive_s,
            Phase.ANSWERING: config.answer_s,
            Phase.UNREAD: config.answer_s,
        }
        self._on_end = on_end
        self._connections: dict[Address, Connection] = {}  # by age
        self._held_bytes = 0

    @property
    def n_connections(self) -> int:
        """How many are open."""
        return len(self._connections)

    @property
    def held_bytes(self) -> int:
        """Of request bodies and of answers that aren't read, in memory."""
        return self._held_bytes

    def protocol(self) -> type[H11Protocol]:
        """Return uvicorn's own HTTP/1.1 protocol, with this guard told of connections and bytes."""
        guard = self

        class GuardedProtocol(H11Protocol):
            def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn's own
                self._address = guard.entered(transport)
                super().connection_made(transport)

            def data_received(self, data: bytes) -> None:
                guard.heard(self._address)
                super().data_received(data)

            def connection_lost(self, exc: Exception | None) -> None:
                guard.left(self._address)
                super().connection_lost(exc)

        return GuardedProtocol

    def entered(self, transport: asyncio.Transport) -> Address:
        """Take a new connection, where need be in another's place."""
        peer = transport.get_extra_info("peername") or ("", id(transport))  # none: gone before we looked
        address = (str(peer[0]), int(peer[1]))
        if len(self._connections) >= self._max_connections:
            self._make_room()
        self._connections[address] = Connection(transport, address, monotonic())
        return address

    def heard(self, address: Address) -> None:
        """Note that bytes came: the first after an answer begin a request."""
        connection = self._connections.get(address)
        if connection is not None and connection.phase in (Phase.IDLE, Phase.UNREAD):
            self._turn(connection, Phase.RECEIVING)

    def left(self, address: Address) -> None:
        """Forget a connection that is closed."""
        connection = self._connections.pop(address, None)
        if connection is not None:
            self._release(connection)

    def begin(self, address: Address) -> int:
        """Note that a request's header is complete; return its number on this connection."""
        connection = self._connections.get(address)
        if connection is None:
            return 0
        connection.n_requests += 1
        if connection.phase in (Phase.IDLE, Phase.UNREAD):  # it was sent behind the one before
            self._turn(connection, Phase.RECEIVING)
        return connection.n_requests

    def hold(self, address: Address, n_bytes: int) -> bool:
        """Count bytes of a body that are kept; return False where there is no memory for them.

        What has been on its way for longer gives way, in either direction; a request being answered doesn't.
        """
        connection = self._connections.get(address)
        if connection is None:
            return False
        while self._held_bytes + n_bytes > self._max_held_bytes:
            slow = [c for c in self._connections.values() if c.phase is not Phase.ANSWERING and c.held_bytes]
            oldest = min(slow, key=lambda c: c.since_s, default=connection)
            if oldest is connection:
                return False
            self._end(oldest, "gave-way")
        connection.held_bytes += n_bytes
        self._held_bytes += n_bytes
        return True

    def received(self, address: Address) -> None:
        """Note that a request has come whole."""
        connection = self._connections.get(address)
        if connection is not None and connection.phase is Phase.RECEIVING:
            self._turn(connection, Phase.ANSWERING)

    def answered(self, address: Address, number: int) -> None:
        """Note that a request's answer is out."""
        connection = self._connections.get(address)
        if connection is not None and connection.n_requests == number:
            self._release(connection)
            n_unread = connection.transport.get_write_buffer_size()
            self._turn(connection, Phase.UNREAD if n_unread else Phase.IDLE)
            if n_unread and not self.hold(address, n_unread):
                self._end(connection, "gave-way")

    async def watch(self) -> None:
        """End what is overdue, for ever."""
        while True:
            now_s = monotonic()
            for connection in list(self._connections.values()):
                if connection.phase is Phase.UNREAD and not connection.transport.get_write_buffer_size():
                    self._release(connection)
                    self._turn(connection, Phase.IDLE)
                if now_s - connection.since_s > self._deadlines_s[connection.phase]:
                    self._end(connection, "deadline")
            await asyncio.sleep(_LOOK_EVERY_S)

    def _make_room(self) -> None:
        """End the oldest connection that is idle or still sending, of the peer that has the most of them."""
        giving = [c for c in self._connections.values() if c.phase is not Phase.ANSWERING]
        if not giving:
            return  # all are being answered, and each has its deadline; the one more is let in
        counts = Counter(c.address[0] for c in giving)
        most = counts.most_common(1)[0][0]
        self._end(min((c for c in giving if c.address[0] == most), key=lambda c: c.since_s), "gave-way")

    def _end(self, connection: Connection, reason: str) -> None:
        self._connections.pop(connection.address, None)  # now, so that its place is free
        self._release(connection)
        connection.transport.abort()  # not close: that would wait for a peer that doesn't read
        self._on_end(reason)

    def _release(self, connection: Connection) -> None:
        self._held_bytes -= connection.held_bytes
        connection.held_bytes = 0

    @staticmethod
    def _turn(connection: Connection, phase: Phase) -> None:
        connection.phase, connection.since_s = phase, monotonic()


class GuardedApp:
    """Tell the guard where each request begins and ends.

    Args:
        app: the ASGI application.
        guard: of the same event loop.
    """

    def __init__(self, app: Callable[[Scope, Receive, Send], Awaitable[None]], guard: Guard) -> None:
        self._app, self._guard = app, guard

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        address = tuple(scope["client"] or ("", 0))
        number = self._guard.begin(address)

        async def counted() -> MutableMapping[str, Any]:
            message = await receive()
            if message["type"] == "http.request" and not message.get("more_body", False):
                self._guard.received(address)
            return message

        try:
            await self._app(scope, counted, send)
        finally:
            self._guard.answered(address, number)
