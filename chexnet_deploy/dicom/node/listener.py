"""Stand between the network and the DICOM library: how many may connect, how much they may send, how long they may take.

No peer can keep another out by being many, large, slow or silent; a peer is a calling AE title at an address, so devices behind
one address don't either. Those who haven't asked for an association yet, and
associations that make no progress, give way to the newest; the peer with the most of them gives way first. What is let
through is in connection.py.
"""

import asyncio
import collections
import contextlib
import socket
import ssl
import threading
from collections.abc import Callable, Coroutine, Iterable
from concurrent.futures import ThreadPoolExecutor
from time import monotonic
from typing import TypeVar

from chexnet_deploy.dicom.node.config import Limits, Listen
from chexnet_deploy.dicom.node.connection import BUFFER_BYTES, Address, Connection, End, Intake
from chexnet_deploy.dicom.node.tls import TlsStream
from chexnet_deploy.errors import NodeError

_LOOK_EVERY_S = 0.2  # for deadlines that have passed
_ASK_EVERY_S = 0.02  # whether an association has ended or fallen quiet
_BACKLOG = 128
_KERNEL_BYTES = 262_144  # of a connection, on its way in; what is not read must wait at the sender

T = TypeVar("T")

OnEnd = Callable[[End], None]
"""Called with how a connection ended."""


class Guard:
    """Accept connections in a thread of its own, from start to stop.

    Args:
        listen: where, and for which networks.
        hand_over: see Connection.
        on_end: called in the guard's thread; must not block.
        tls: for every connection; None: for none.
    """

    def __init__(
        self,
        listen: Listen,
        limits: Limits,
        intake: Intake,
        hand_over: Callable[[socket.socket, Address], None],
        on_end: OnEnd,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self._listen_to, self._limits, self._intake, self._tls = listen, limits, intake, tls
        self._hand_over, self._on_end = hand_over, on_end
        self._waiting: dict[Connection, None] = {}  # by age; not associated yet
        self._asking: dict[Connection, None] = {}  # for an association
        self._associated: dict[Connection, None] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._disk = ThreadPoolExecutor(limits.max_associations, thread_name_prefix="intake")
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="guard", daemon=True)
        self._server: asyncio.Server | None = None
        self._sweeper: asyncio.Task[None] | None = None

    def start(self) -> Address:
        """Listen; return the address bound.

        Raises:
            NodeError: the address can't be had.
        """
        self._thread.start()
        try:
            return self._call(self._listen())
        except OSError as err:
            self._halt()
            raise NodeError(
                f"can't listen on {self._listen_to.host} port {self._listen_to.port}: {err.strerror}. "
                f"Check [listen] and whether another program has the port."
            ) from err

    def stop_listening(self) -> None:
        """Take no new connections; those that are there go on."""
        self._call(self._close_server())

    @property
    def n_associations(self) -> int:
        """How many associations are open."""
        return len(self._associated)

    def stop(self) -> None:
        """End every connection and the thread."""
        self._call(self._end_all())
        self._halt()

    async def _listen(self) -> Address:
        # A small buffer in the stream and one in the kernel are the whole of what a peer can fill unasked.
        host, port = self._listen_to.host, self._listen_to.port
        # The protocol is named because asyncio sends at once (TCP_NODELAY) only on sockets that name it.
        listener = socket.socket(
            socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP
        )
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _KERNEL_BYTES)
        try:
            listener.bind((host, port))
            self._server = await asyncio.start_server(self._accept, sock=listener, limit=BUFFER_BYTES, backlog=_BACKLOG)
        except OSError:
            listener.close()
            raise
        self._sweeper = asyncio.ensure_future(self._sweep())
        host, port = listener.getsockname()[:2]
        return host, port

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        peer = writer.get_extra_info("peername")
        if peer is None or not self._listen_to.may_connect(peer[0]):  # None: gone before we looked
            writer.transport.abort()
            if peer is not None:
                self._on_end(End(peer[0], "rejected", "network"))
            return
        connection = self._connection(reader, writer, peer[:2])
        self._make_room(connection.peer)
        self._waiting[connection] = None
        task = asyncio.current_task()
        assert task is not None  # start_server runs this as one
        self._tasks.add(task)
        try:
            await connection.run(self._admit)
        finally:
            self._tasks.discard(task)
            for group in (self._waiting, self._asking, self._associated):
                group.pop(connection, None)
            self._on_end(connection.how)

    def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, address: Address) -> Connection:
        tls = None if self._tls is None else TlsStream(reader, writer, self._tls)
        return Connection(
            tls or reader,
            tls or writer,
            address,
            self._limits,
            self._intake,
            hand_over=self._hand_over,
            disk=self._disk,
        )

    def _party(self, connection: Connection) -> tuple[str, str]:
        """Return who shares a limit with this connection: the same device, as far as it can be told."""
        calling = connection.request.calling
        # Invented titles are one, or each would bring a share of its own.
        return connection.peer, calling if calling in self._listen_to.calling_ae_titles else ""

    def _make_room(self, peer: str) -> None:
        mine = [c for c in self._waiting if c.peer == peer]
        if len(mine) >= self._limits.max_waiting_per_peer:
            self._evict(mine[0], self._waiting)
        elif len(self._waiting) >= self._limits.max_waiting:
            self._evict(self._oldest_of_the_most(self._waiting), self._waiting)

    async def _admit(self, connection: Connection) -> bool:
        """Give a peer that has asked for an association a place, within the time that it had to ask."""
        if connection not in self._waiting:
            return False  # evicted while it asked
        del self._waiting[connection]
        if len(self._asking) >= self._limits.max_waiting:
            self._evict(self._oldest_of_the_most(self._asking), self._asking)
        self._asking[connection] = None
        end_s = connection.opened_s + self._limits.request_deadline_s
        while not self._find_place(connection):
            if monotonic() > end_s:
                return False
            await asyncio.sleep(_ASK_EVERY_S)
        self._asking.pop(connection, None)
        return True

    def _find_place(self, connection: Connection) -> bool:
        others = [c for c in self._associated if self._party(c) == self._party(connection)]
        if len(others) < self._limits.max_associations_per_peer:
            if len(self._associated) < self._limits.max_associations:
                self._associated[connection] = None
                return True
            others = list(self._associated)
        now_s = monotonic()
        quiet = [c for c in others if c.is_quiet(now_s)]
        if not quiet:
            return False
        self._evict(min(quiet, key=lambda c: c.progress_s), self._associated)
        self._associated[connection] = None
        return True

    @staticmethod
    def _evict(connection: Connection, group: dict[Connection, None]) -> None:
        del group[connection]  # now, so that its place is free; its task ends when the loop comes to it
        connection.end("gave-way")

    def _oldest_of_the_most(self, connections: Iterable[Connection]) -> Connection:
        """Return the oldest connection of the peer that has the most of them."""
        counts = collections.Counter(map(self._party, connections))
        most = counts.most_common(1)[0][0]
        return next(c for c in connections if self._party(c) == most)

    async def _sweep(self) -> None:
        while True:
            now_s = monotonic()
            for connection in [*self._waiting, *self._asking, *self._associated]:
                if connection.is_overdue(now_s):
                    connection.end("timed-out")
            await asyncio.sleep(_LOOK_EVERY_S)

    async def _close_server(self) -> None:
        if self._server is not None:
            self._server.close()
        for connection in [*self._waiting, *self._asking]:
            connection.end("stopped")

    async def _end_all(self) -> None:
        await self._close_server()
        if self._sweeper is not None:
            self._sweeper.cancel()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _halt(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        with contextlib.suppress(RuntimeError):
            self._loop.close()
        self._disk.shutdown()

    def _call(self, coroutine: Coroutine[None, None, T]) -> T:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result()
