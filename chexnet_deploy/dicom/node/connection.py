"""One peer's connection through the guard: whole, small, ordered PDUs are let through, everything else ends it.

Image data never reach the DICOM library behind: they go to disk here, in bounded pieces, and a token takes their place in
the stream. So what one peer can make this process hold in memory is a few buffers, whatever it declares or sends.
"""

import asyncio
import contextlib
import functools
import socket
import ssl
from collections.abc import Awaitable, Callable
from concurrent.futures import Executor
from time import monotonic
from types import MappingProxyType
from typing import Final, NamedTuple, ParamSpec, Protocol, TypeVar

from chexnet_deploy.dicom.node.config import Limits
from chexnet_deploy.dicom.node.pdu import (
    HEADER_BYTES,
    STORE_RQ,
    Command,
    MessageReader,
    PduFault,
    PduType,
    Pdv,
    Request,
    accepted_syntaxes,
    read_header,
    read_pdvs,
    read_request,
    write_abort,
    write_busy,
    write_pdv,
)
from chexnet_deploy.dicom.node.tls import TlsStream

BUFFER_BYTES: Final = 65_536
_DISK_PIECE_BYTES: Final = 262_144  # one hop to a disk thread for so many bytes
_FLUSH_S: Final = 1.0  # for a last A-ABORT or A-ASSOCIATE-RJ; then the connection is cut
_NO_REASON, _INVALID_PARAMETER = 0, 6  # of A-ABORT (PS3.8 table 9-26)

# Of A-ASSOCIATE-RJ: source and reason (PS3.8 table 9-21).
_REJECTED: Final = MappingProxyType({(1, 3): "calling-ae-title", (1, 7): "called-ae-title"})
_OVER_LIMITS: Final = frozenset({"object-too-large", "association-too-large", "pdu-length", "command-length"})
_MOST_NAMED: Final = 8  # SOP classes in one line of a log

Address = tuple[str, int]
P = ParamSpec("P")
T = TypeVar("T")


class Transfer(Protocol):
    """An object on its way to disk. A disk that fails refuses the object at its end; it doesn't end the connection."""

    token: bytes

    def write(self, piece: bytes) -> None:
        """Append a piece of the data set."""

    def finish(self) -> None:
        """Say that all pieces were written."""

    def discard(self) -> None:
        """Remove what was written, unless somebody took the object already."""


class Intake(Protocol):
    """Where objects go."""

    def begin(self, command: Command, transfer_syntax: str) -> Transfer:
        """Start an object; one that has no room is refused at its end."""


class End(NamedTuple):
    """How a connection ended, for logs: codes, addresses and AE titles, nothing about a patient.

    Attributes:
        reason: released; rejected; no-context, none of what was asked for is offered; timed-out; limit, of size; protocol, a
            fault in it; tls; aborted; cut, without a word; busy; gave-way to another; stopped, by the node's own end.
        detail: more of it, a code.
        calling: the AE title of whoever asked; empty where nobody did.
        called: the AE title asked for; likewise.
        not_accepted: SOP classes that were asked for and are not offered.
    """

    peer: str
    reason: str
    detail: str = ""
    calling: str = ""
    called: str = ""
    not_accepted: tuple[str, ...] = ()


class Connection:
    """A peer, from accept to close; lives in the guard's event loop.

    Args:
        reader: with a TlsStream the handshake comes first, in the time to ask for an association.
        address: the peer's.
        hand_over: gives one end of a socket pair, and the peer's address, to the DICOM library.

    Attributes:
        peer: its address without the port.
        request: what it asks for, once it has.
        progress_s: when it last moved a message or BUFFER_BYTES forward, on the monotonic clock.
        ended: End.reason, once it is known.
    """

    def __init__(
        self,
        reader: asyncio.StreamReader | TlsStream,
        writer: asyncio.StreamWriter | TlsStream,
        address: Address,
        limits: Limits,
        intake: Intake,
        *,
        hand_over: Callable[[socket.socket, Address], None],
        disk: Executor,
    ) -> None:
        self._reader, self._writer, self._address, self._limits = reader, writer, address, limits
        self._intake, self._hand_over, self._disk = intake, hand_over, disk
        self.peer = self._address[0]
        self.request = Request("", "", {})
        self.progress_s = self.opened_s = monotonic()
        self.ended = self._detail = ""
        self._not_accepted: tuple[str, ...] = ()
        self._is_associated = False
        self._deadline_s = self.opened_s + limits.request_deadline_s
        self._write_deadline_s = float("inf")
        self._messages = MessageReader()
        self._syntaxes: dict[int, str] = {}
        self._n_bytes = self._n_bytes_at_progress = 0
        self._command: Command | None = None
        self._transfer: Transfer | None = None
        self._piece, self._object_bytes = bytearray(), 0
        self._answered = asyncio.Event()
        self._answered.set()
        self._task: asyncio.Task[None] | None = None

    def is_overdue(self, now_s: float) -> bool:
        """Whether a deadline has passed. While the node owes an answer, the peer's own clocks stand still."""
        is_late = self._deadline_s < now_s and self._answered.is_set()
        return is_late or self._write_deadline_s < now_s or self.opened_s + self._limits.association_deadline_s < now_s

    def is_quiet(self, now_s: float) -> bool:
        """Whether it makes no progress though it is its turn, so that it may be ended for another's sake."""
        return self._answered.is_set() and now_s - self.progress_s > self._limits.quiet_after_s

    @property
    def how(self) -> End:
        """How it ended."""
        asked = self.request
        return End(self.peer, self.ended, self._detail, asked.calling, asked.called, self._not_accepted)

    def _note(self, reason: str, detail: str = "") -> None:
        """Remember how it ends; what is known first is the reason, and what follows its consequence."""
        if not self.ended:
            self.ended, self._detail = reason, detail

    def end(self, reason: str) -> None:
        """End it from outside."""
        self._note(reason)
        if self._task is not None:
            self._task.cancel()

    async def run(self, admit: Callable[["Connection"], Awaitable[bool]]) -> None:
        """Serve the peer to its end.

        Args:
            admit: asked once a whole association request is there; may take a while; False turns the peer away.
        """
        self._task = asyncio.current_task()
        last_words = b""
        try:
            if isinstance(self._reader, TlsStream):
                await self._reader.handshake()
            kind, request = await self._read_pdu()
            if kind != PduType.ASSOCIATE_RQ:
                raise PduFault("pdu-order")
            self.request = read_request(request[HEADER_BYTES:])
            if await admit(self):
                self._is_associated = True
                await self._associate(request)
                self._note("aborted", "by-node")  # the library closed it, and said nothing
            else:
                self._note("busy")
                last_words = write_busy()
        except PduFault as fault:
            self._note("limit" if fault.reason in _OVER_LIMITS else "protocol", fault.reason)
            last_words = write_abort(_INVALID_PARAMETER)
        except asyncio.CancelledError:
            self._note("stopped")
            last_words = write_abort(_NO_REASON) if self._is_associated else b""
        except (asyncio.IncompleteReadError, ssl.SSLEOFError):
            self._note("cut")
        except ssl.SSLError as err:  # its reason is one of OpenSSL's words
            self._note("tls", str(err.reason).lower().replace("_", "-"))
        except OSError:
            self._note("cut")
        finally:
            if self._transfer is not None:
                self._transfer.discard()
            self._close(last_words)

    def _close(self, last_words: bytes) -> None:
        transport = self._writer.transport
        if not self._is_associated and not last_words:
            transport.abort()
            return
        with contextlib.suppress(OSError):
            self._writer.write(last_words)
            self._writer.close()
        # A peer that doesn't read must not keep the connection by that.
        asyncio.get_running_loop().call_later(_FLUSH_S, transport.abort)

    async def _associate(self, request: bytes) -> None:
        ours, theirs = socket.socketpair()
        await self._on_disk_thread(self._hand_over, theirs, self._address)
        behind_reader, behind = await asyncio.open_connection(sock=ours, limit=BUFFER_BYTES)
        try:
            behind.write(request)
            pumps = [
                asyncio.ensure_future(self._inwards(behind)),
                asyncio.ensure_future(self._outwards(behind_reader)),
            ]
            try:
                done, _ = await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
                for pump in done:
                    pump.result()
            finally:
                for pump in pumps:
                    pump.cancel()
                await asyncio.gather(*pumps, return_exceptions=True)
        finally:
            behind.close()

    async def _read_pdu(self) -> tuple[PduType, bytes]:
        """Return the peer's next PDU, whole, with its header."""
        header = await self._reader.readexactly(1)
        if self._is_associated:
            self._deadline_s = monotonic() + self._limits.pdu_deadline_s
        header += await self._reader.readexactly(HEADER_BYTES - 1)
        kind, length = read_header(header, max_data_bytes=self._limits.max_pdu_bytes)
        pdu = header + await self._reader.readexactly(length)
        self._count(len(pdu))
        return kind, pdu

    def _count(self, n_bytes: int) -> None:
        self._n_bytes += n_bytes
        if self._n_bytes > self._limits.max_association_bytes:
            raise PduFault("association-too-large")
        if self._n_bytes - self._n_bytes_at_progress >= BUFFER_BYTES:
            self._has_progressed()
        self._deadline_s = monotonic() + self._limits.idle_s

    def _has_progressed(self) -> None:
        self.progress_s, self._n_bytes_at_progress = monotonic(), self._n_bytes

    async def _inwards(self, behind: asyncio.StreamWriter) -> None:
        while True:
            kind, pdu = await self._read_pdu()
            if kind == PduType.P_DATA:
                for pdv in read_pdvs(pdu[HEADER_BYTES:]):
                    await self._take(pdv, behind)
            elif kind == PduType.ABORT or (
                kind in (PduType.RELEASE_RQ, PduType.RELEASE_RP) and self._messages.is_between_messages
            ):
                if kind == PduType.ABORT:
                    self._note("aborted", "by-peer")
                behind.write(pdu)
                await behind.drain()
            else:
                raise PduFault("pdu-order")

    async def _take(self, pdv: Pdv, behind: asyncio.StreamWriter) -> None:
        if not pdv.is_command:
            await self._take_data(pdv, behind)
            return
        # One operation at a time: more were never negotiated (PS3.7 annex D.3.3.3), and what waits here waits at the peer.
        await self._answered.wait()
        command = self._messages.read_command(pdv)
        if command is None:
            return
        if command.field == STORE_RQ:
            syntax = self._syntaxes.get(command.context_id)
            if syntax is None:
                raise PduFault("context-not-accepted")
            self._command, self._object_bytes = command, 0
            self._transfer = await self._on_disk_thread(self._intake.begin, command, syntax)
        else:
            await self._ask(behind, write_pdv(command.context_id, command.encoded, is_command=True))

    async def _take_data(self, pdv: Pdv, behind: asyncio.StreamWriter) -> None:
        self._messages.check_data(pdv)
        assert self._transfer is not None  # MessageReader lets no data through before a command
        assert self._command is not None
        self._object_bytes += len(pdv.content)
        if self._object_bytes > self._limits.max_object_bytes:
            raise PduFault("object-too-large")
        self._piece += pdv.content
        if pdv.is_last or len(self._piece) >= _DISK_PIECE_BYTES:
            piece, self._piece = bytes(self._piece), bytearray()
            await self._on_disk_thread(self._transfer.write, piece)
        if pdv.is_last:
            await self._on_disk_thread(self._transfer.finish)
            command, context_id = self._command, self._command.context_id
            # Only now, and together: the library behind would count the time of a long transfer as silence.
            await self._ask(
                behind,
                write_pdv(context_id, command.encoded, is_command=True)
                + write_pdv(context_id, self._transfer.token, is_command=False),
            )

    async def _ask(self, behind: asyncio.StreamWriter, message: bytes) -> None:
        self._has_progressed()
        self._answered.clear()
        behind.write(message)
        await behind.drain()

    async def _outwards(self, behind: asyncio.StreamReader) -> None:
        while True:
            try:
                header = await behind.readexactly(HEADER_BYTES)
            except asyncio.IncompleteReadError:
                return  # the library ended the association
            kind, length = read_header(header, max_data_bytes=self._limits.max_pdu_bytes)
            body = await behind.readexactly(length)
            self._note_answer(kind, body)
            self._write_deadline_s = monotonic() + self._limits.pdu_deadline_s
            self._writer.write(header + body)
            await self._writer.drain()
            self._write_deadline_s = float("inf")
            if kind == PduType.P_DATA and any(pdv.is_command and pdv.is_last for pdv in read_pdvs(body)):
                self._has_progressed()
                self._deadline_s = monotonic() + self._limits.idle_s
                self._answered.set()

    def _note_answer(self, kind: PduType, body: bytes) -> None:
        """Learn from the library's answer what was agreed upon, or how it ends."""
        if kind == PduType.ASSOCIATE_AC:
            self._syntaxes = accepted_syntaxes(body)
            asked = self.request.abstract_syntaxes
            served = {asked.get(context_id) for context_id in self._syntaxes}
            self._not_accepted = tuple(dict.fromkeys(uid for uid in asked.values() if uid not in served))[:_MOST_NAMED]
            if not self._syntaxes:
                self._note("no-context")
        elif kind == PduType.ASSOCIATE_RJ:
            source, reason = body[2], body[3]
            self._note("rejected", _REJECTED.get((source, reason), f"source-{source}-reason-{reason}"))
        elif kind == PduType.RELEASE_RP:
            self._note("released")
        elif kind == PduType.ABORT:
            self._note("aborted", "by-node")

    async def _on_disk_thread(self, function: Callable[P, T], *arguments: P.args, **options: P.kwargs) -> T:
        call = functools.partial(function, *arguments, **options)
        return await asyncio.get_running_loop().run_in_executor(self._disk, call)
