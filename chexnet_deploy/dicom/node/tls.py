"""TLS as DICOM profiles it: PS3.15 section B.12, BCP 195 with RFC 8996 and RFC 9325, both sides with a certificate.

The listener's handshake is done over the guard's own streams and not by asyncio, which would accept without limit whoever never
finishes one; here it counts as asking for an association, within the same time and number.
"""

import asyncio
import contextlib
import ssl
from collections.abc import Callable
from pathlib import Path
from typing import Final, TypeVar

from chexnet_deploy.dicom.node.config import Tls
from chexnet_deploy.errors import NodeError

# RFC 9325 section 4.2; those of TLS 1.3 are all good and can't be chosen.
CIPHERS: Final = (
    "ECDHE-ECDSA-AES256-GCM-SHA384",
    "ECDHE-RSA-AES256-GCM-SHA384",
    "ECDHE-ECDSA-AES128-GCM-SHA256",
    "ECDHE-RSA-AES128-GCM-SHA256",
)
_PIECE_BYTES: Final = 65_536

T = TypeVar("T")


def open_context(settings: Tls, *, is_server: bool) -> ssl.SSLContext:
    """Return what this node shows and whom it believes.

    Whoever has a certificate of the authorities is a peer: names in certificates are not compared, as DICOM devices are
    addressed by number.

    Raises:
        NodeError: a file can't be read, does not fit the others, or the key is open to others.
    """
    _check_key(settings.key)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if is_server else ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_REQUIRED
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.options |= ssl.OP_NO_RENEGOTIATION
    context.set_ciphers(":".join(CIPHERS))
    try:
        context.load_cert_chain(settings.certificate, settings.key, password=_no_password)
        context.load_verify_locations(settings.authorities)
    except (OSError, ValueError) as err:  # ssl.SSLError is an OSError
        raise NodeError(
            f"[tls] can't be used: {err}. Give certificate, its unencrypted key and the authorities as PEM files."
        ) from err
    return context


def _check_key(path: Path) -> None:
    try:
        mode = path.stat().st_mode
    except OSError as err:
        raise NodeError(f"{path} can't be read: {err.strerror}. Check tls.key in the configuration.") from err
    if mode & 0o077:
        raise NodeError(f"{path} has mode {mode & 0o7777:04o}: others may use the node's key. Run: chmod go-rwx {path}")


def _no_password() -> str:
    raise ValueError("the key is encrypted")  # OpenSSL would ask for it on the terminal


class TlsStream:
    """The server's end of TLS over a connection's streams, for its Reader and its Writer."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, context: ssl.SSLContext) -> None:
        self._reader, self._writer = reader, writer
        self._in, self._out = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._in, self._out, server_side=True)

    @property
    def transport(self) -> asyncio.WriteTransport:
        """What lies below, to be cut off."""
        return self._writer.transport

    async def handshake(self) -> None:
        """Agree on keys and check the peer's certificate.

        Raises:
            ssl.SSLError: they don't agree, or the certificate is none of the authorities'.
        """
        await self._do(self._tls.do_handshake)

    async def readexactly(self, n: int) -> bytes:
        """Return so many bytes; see asyncio.StreamReader."""
        read = bytearray()
        while len(read) < n:
            missing = n - len(read)
            piece = await self._do(lambda: self._tls.read(missing))  # noqa: B023 - called before the next round
            if not piece:
                raise asyncio.IncompleteReadError(bytes(read), n)
            read += piece
        return bytes(read)

    def write(self, data: bytes) -> None:
        """Send, as far as the system takes it; see asyncio.StreamWriter."""
        if data:
            self._tls.write(data)
        self._flush()

    async def drain(self) -> None:
        """Wait until what was written is not too much."""
        await self._writer.drain()

    def close(self) -> None:
        """Say that no more comes, and close."""
        with contextlib.suppress(ssl.SSLError):  # the peer's own last word is not waited for
            self._tls.unwrap()
        self._flush()
        self._writer.close()

    async def _do(self, step: Callable[[], T]) -> T:
        while True:
            try:
                return step()
            except ssl.SSLWantReadError:
                self._flush()
                piece = await self._reader.read(_PIECE_BYTES)
                if piece:
                    self._in.write(piece)
                else:
                    self._in.write_eof()
            finally:
                self._flush()

    def _flush(self) -> None:
        if self._out.pending:
            self._writer.write(self._out.read())
