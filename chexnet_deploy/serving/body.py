"""Read a request's body: whole, bounded after inflating too, and never onto a disk.

A limit of N bytes lets N through and refuses N + 1, whether they came plain or compressed.
"""

import zlib
from typing import Final

from starlette.requests import Request

from chexnet_deploy.serving.guard import Guard
from chexnet_deploy.serving.refusals import Fault, RequestError, bad_request, busy

_WINDOW_BITS: Final = {"gzip": 31, "deflate": zlib.MAX_WBITS}  # zlib's: 16 more for a gzip header
_PIECE: Final = 2**20


async def read_body(request: Request, guard: Guard, limit_bytes: int) -> bytes:
    """Return a body as it came, see `inflate`.

    Where it is too large, as many bytes again are read and dropped before the refusal, as a client that is still sending
    often doesn't see an answer.

    Raises:
        RequestError: 413 too large, 503 no memory for it now.
        ClientDisconnect: the client went away, or was ended.
    """
    address = (request.client.host, request.client.port) if request.client else ("", 0)
    stated = request.headers.get("content-length", "")
    if stated.isascii() and stated.isdigit() and int(stated[:20]) > 2 * limit_bytes:
        raise too_large(limit_bytes)
    body, n_bytes = (
        bytearray(),
        0,
    )  # not a list of parts: one byte at a time, that would hold fifty for each that is counted
    async for part in request.stream():
        n_bytes += len(part)
        if n_bytes > 2 * limit_bytes:
            break
        if n_bytes > limit_bytes:
            body.clear()
        elif part:
            if not guard.hold(address, len(part)):
                raise busy(Fault.BUSY, "Too much is being sent at once. Try again later.")
            body += part
    if n_bytes > limit_bytes:
        raise too_large(limit_bytes)
    return bytes(body)


def inflate(body: bytes, encoding: str | None, limit_bytes: int) -> bytes:
    """Return a body without its Content-Encoding; may take a while, but never more than limit_bytes of memory and a piece.

    Args:
        body: as it came.
        encoding: the header, None where there is none.
        limit_bytes: of the result.

    Raises:
        RequestError: 413 too large, 415 another encoding than gzip and deflate, 400 damaged or followed by something else.
    """
    name = (encoding or "identity").strip().lower()
    if name == "identity":
        return body
    if name not in _WINDOW_BITS:
        raise RequestError(415, Fault.ENCODING, "Content-Encoding must be gzip, deflate or identity.")
    stream = zlib.decompressobj(_WINDOW_BITS[name])
    parts, n_bytes, rest = list[bytes](), 0, body
    try:
        while not stream.eof:
            part = stream.decompress(rest, _PIECE)
            rest = stream.unconsumed_tail
            n_bytes += len(part)
            if n_bytes > limit_bytes:
                raise too_large(limit_bytes)
            if not part and not rest and not stream.eof:
                raise bad_request(f"The {name} body ends too early. Send it again.")
            parts.append(part)
    except zlib.error as err:
        raise bad_request(f"The body is no {name} data. Send it again.") from err
    if stream.unused_data:
        raise bad_request(f"Something follows the {name} data. Send one {name} member.")
    return b"".join(parts)


def too_large(limit_bytes: int) -> RequestError:
    """Return the 413 of a body that is larger than limit_bytes."""
    return RequestError(413, Fault.TOO_LARGE, f"The body is larger than {limit_bytes:,} bytes, the limit here.")
