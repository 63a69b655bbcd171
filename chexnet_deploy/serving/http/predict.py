"""POST /predict: one image file -> named probabilities, and on request the radiograph and a class activation map as PNG.

A body is read into memory, never onto a disk. A limit of N bytes accepts N and refuses N + 1, plain or inflated.
"""

import base64
import io
import json
import zlib
from collections.abc import Mapping
from time import monotonic
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.requests import Request
from starlette.responses import Response

from chexnet_deploy.bundle.site import OperatingPoints
from chexnet_deploy.errors import ImageError, MissingPackageError, RefusalReason
from chexnet_deploy.images import Gray, Pixels
from chexnet_deploy.runtime.loading import PixelLoader
from chexnet_deploy.runtime.predictor import Prediction, draw_cam
from chexnet_deploy.serving.http.limits import Guard
from chexnet_deploy.serving.http.loaded_model import Engine
from chexnet_deploy.serving.http.refusals import IMAGE_REFUSALS, Fault, RequestError, bad_request, busy
from chexnet_deploy.serving.http.service import Service

_PICTURE_PX: Final = 1024  # longer side of a picture: enough for a page, a few megabytes at the most
_PARAMETERS: Final = frozenset({"cam", "radiograph"})


class _Prepared(NamedTuple):
    gray: Gray
    pixels: Pixels
    preprocess_s: float


async def predict(service: Service, request: Request) -> Response:
    """Handle POST /predict.

    Raises:
        RequestError: 422 with a RefusalReason where the image is refused; 400, 413, 415, 503.
    """
    query = request.query_params
    if not set(query) <= _PARAMETERS or len(query.multi_items()) > len(query):
        raise bad_request("The query parameters are cam and radiograph, each given once.")
    if query.get("radiograph", "png") != "png":
        raise bad_request("radiograph must be png.")
    began_s = monotonic()
    body = await read_body(request, service.guard, service.config.max_body_bytes)
    service.metrics.stage.labels("read").observe(monotonic() - began_s)
    deadline_s = monotonic() + service.config.deadline_s
    with service.use_engine() as engine, service.admission.admit(1):
        cam = query.get("cam")
        if cam is not None and cam not in engine.bundle.manifest.findings:
            raise bad_request("cam must be one of the model's findings; /engine names them.")
        headers, limit = request.headers, service.config.max_body_bytes
        loader = PixelLoader.of(engine.bundle.manifest, service.reader, checks=True)
        prepared = await service.work(lambda: _prepare(body, headers, limit, loader), deadline_s)
        service.metrics.stage.labels("preprocess").observe(prepared.preprocess_s)
        answer = await service.infer(engine, prepared.pixels, deadline_s)
        content = _describe(engine, answer.logits[0], service.config.name)
        if cam is not None:
            heat = answer.maps[0, engine.bundle.manifest.findings.index(cam)]
            content["cam"] = {
                "finding": cam,
                "has_evidence": bool(heat.max() > 0.0),  # without any the picture stays gray
                "png_base64": await _draw_png(service, prepared.gray, heat),
            }
        if "radiograph" in query:
            content["radiograph"] = {"png_base64": await _draw_png(service, prepared.gray, None)}
    return Response(json.dumps(content), media_type="application/json")


def _prepare(body: bytes, headers: Mapping[str, str], limit_bytes: int, loader: PixelLoader) -> _Prepared:
    """Decode, check and preprocess the image in a body; runs in a decoding thread.

    Raises:
        RequestError: 400, 413, 415, 422.
    """
    began_s = monotonic()
    content = inflate(body, headers.get("content-encoding"), limit_bytes)
    kind, options = parse_options_header(headers.get("content-type", ""))
    if kind == b"multipart/form-data":
        content = _take_file(content, options.get(b"boundary", b""))
    if not content:
        raise bad_request(
            "The request holds no file. Send a PNG, JPEG or DICOM file as the body, or as a form's one part."
        )
    try:
        gray, pixels = loader.load(content)
    except ImageError as err:
        if err.reason is RefusalReason.BUSY:
            raise busy(Fault.BUSY, IMAGE_REFUSALS[err.reason]) from err
        raise RequestError(422, err.reason, IMAGE_REFUSALS[err.reason]) from err
    except MissingPackageError as err:
        raise RequestError(415, Fault.ENCODING, "This service is installed without DICOM. Send PNG or JPEG.") from err
    return _Prepared(gray, pixels, monotonic() - began_s)


def _take_file(content: bytes, boundary: bytes) -> bytes:
    """Return the one part of a form (RFC 7578); its name and file name are not looked at.

    Raises:
        RequestError: 400, it is damaged or has none or several.
    """
    parts = list[bytearray]()
    ended = list[bool]()
    callbacks = {
        "on_part_begin": lambda: parts.append(bytearray()),
        "on_part_data": lambda data, start, end: parts[-1].extend(memoryview(data)[start:end]),
        "on_end": lambda: ended.append(True),
    }
    try:
        parser = MultipartParser(boundary, callbacks)  # type: ignore[arg-type]  # its table names all callbacks, most optional
        parser.write(content)
        parser.finalize()
    except (FormParserError, ValueError) as err:
        raise bad_request("The form is damaged. Send multipart/form-data with one file, or the file itself.") from err
    if len(parts) != 1 or not ended:
        raise bad_request("The form must be whole and hold one file and nothing else.")
    return bytes(parts[0])


def _describe(engine: Engine, logits: NDArray[np.float32], model: str) -> dict[str, object]:
    prediction = Prediction.of(logits, None, engine.bundle.manifest.findings, engine.points)
    return {
        "probabilities": prediction.probabilities,
        "present": prediction.present,
        **describe_points(engine.points),
        "model": model,
        "bundle": engine.bundle.id,
        "precision": engine.precision,
        "backend": engine.backend,
    }


def describe_points(points: OperatingPoints) -> dict[str, object]:
    """Return what decides, for an answer: absent_below says where something else than `operating_points` does."""
    below = {name: point for name, point in points.absent_below.items() if points.present_at.get(name) != point}
    return {
        "operating_points": dict(points.present_at),
        "absent_below": below,
        "operating_points_from": points.source,
    }


async def _draw_png(service: Service, gray: Gray, heat: NDArray[np.float32] | None) -> str:
    """Return a PNG of at most 1024 px as base64, with a finding's map over it where one is given; drawn in a decoding thread.

    Raises:
        RequestError: 503, no thread was free before the deadline.
    """

    def draw() -> str:
        image = Image.fromarray(gray)
        image.thumbnail((_PICTURE_PX, _PICTURE_PX), Image.Resampling.BILINEAR)
        stream = io.BytesIO()
        (image if heat is None else Image.fromarray(draw_cam(np.asarray(image), heat))).save(stream, "PNG")
        return base64.b64encode(stream.getvalue()).decode()

    return await service.work(draw, monotonic() + service.config.deadline_s)


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
