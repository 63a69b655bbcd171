"""The process that runs the codecs: `python -m chexnet_deploy.images.dicom.child`, started by process.py and by nothing else.

Reads questions from the socket it is given, decodes in the memory that came with one of them, answers in one line. It has
limits on memory, processor time and open files and can't write a file, so that a codec that crashes or hangs costs one
image.
"""

import contextlib
import io
import json
import math
import mmap
import os
import resource
import socket
import sys
import warnings
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL.Jpeg2KImagePlugin import Jpeg2KImageFile
from pydicom.encaps import get_frame
from pydicom.pixels.decoders.base import get_decoder
from pydicom.pixels.utils import get_j2k_parameters
from pydicom.uid import UID, JPEGLossless

from chexnet_deploy.images.dicom.codestreams import JPEG_2000, JPEG_BASELINE, JPEG_EXTENDED, RLE
from chexnet_deploy.images.dicom.process import MAX_LINE_BYTES, DecodeRequest

_SPARE_CPU_S = 2  # the parent's deadline is to come first; this one is for a child whose parent was killed


def main() -> None:
    """Answer requests until the parent closes the socket."""
    channel = socket.socket(fileno=int(sys.argv[1]))
    _limit(memory_mib=int(sys.argv[2]))
    channel.send(b"ready")
    shared: mmap.mmap | None = None
    while True:
        question, new_memory, _, _ = socket.recv_fds(channel, MAX_LINE_BYTES, 1)
        if not question:
            return
        for memory in new_memory:
            shared = mmap.mmap(memory, 0)
            os.close(memory)
        assert shared is not None  # it comes with the first question
        with contextlib.suppress(OSError):  # the parent has gone
            asked = json.loads(question)
            channel.send(json.dumps({"number": asked["number"], **_answer(asked, shared)}).encode())


def _limit(*, memory_mib: int) -> None:
    """Give up what a codec doesn't need."""
    for which, limit in (
        (resource.RLIMIT_AS, memory_mib * 2**20),
        (resource.RLIMIT_CORE, 0),  # a core dump would hold the image
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_NOFILE, 16),
    ):
        resource.setrlimit(which, (limit, limit))
    warnings.simplefilter("ignore")  # a codec's warnings quote the file


def _answer(question: dict[str, Any], shared: mmap.mmap) -> dict[str, str | int]:
    """Decode one image in the memory and say how it went: {"bits": of a word} or {"error": in a few words}."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    limit_s = math.ceil(used.ru_utime + used.ru_stime) + question["deadline_s"] + _SPARE_CPU_S
    resource.setrlimit(resource.RLIMIT_CPU, (limit_s, resource.getrlimit(resource.RLIMIT_CPU)[1]))
    plugin = _plugin(question["transfer_syntax_uid"])
    if plugin not in get_decoder(UID(question["transfer_syntax_uid"])).available_plugins:
        return {"error": f"{plugin} is missing or without this codec"}
    request = DecodeRequest(**{name: question[name] for name in DecodeRequest.__slots__})
    source = shared[: question["source_bytes"]]
    try:
        words = decode_smaller(request, source) if request.halvings else decode_words(question, source)
    except MemoryError:
        return {"error": "more memory than it may have"}
    except Exception as err:  # noqa: BLE001  a decoder fed with damaged bytes raises whatever it likes
        return {"error": type(err).__name__}  # its message could quote the file
    if words.shape != request.shape or words.itemsize > 2:
        return {"error": "pixels of another shape"}
    np.frombuffer(shared, words.dtype, words.size, question["pixels_at"]).reshape(words.shape)[...] = words
    return {"bits": 8 * words.itemsize}


def decode_words(question: dict[str, Any], source: bytes) -> NDArray[Any]:
    """Return the decoded words [rows, columns], unsigned whatever they mean; raises whatever the codec raises.

    Args:
        question: process.DecodeRequest's fields by name.
        source: encapsulated pixel data.
    """
    syntax = UID(question["transfer_syntax_uid"])
    # pydicom's plugin refuses 12 bits of it, but gdcm decodes every JPEG by the stream's own header, and this one as DCMTK does.
    run_as = JPEGLossless if syntax == JPEG_EXTENDED else syntax
    options: Any = {  # pydicom's types want a TypedDict that it doesn't export
        "transfer_syntax_uid": run_as,
        "rows": question["rows"],
        "columns": question["columns"],
        "number_of_frames": 1,
        "samples_per_pixel": 1,
        "bits_allocated": question["bits_allocated"],
        "bits_stored": question["bits_stored"],
        "pixel_representation": int(question["is_signed"]),
        "photometric_interpretation": "MONOCHROME2",
        "pixel_keyword": "PixelData",
    }
    pixels, _ = get_decoder(run_as).as_array(source, decoding_plugin=_plugin(syntax), raw=True, **options)
    return pixels.view(f"u{pixels.dtype.itemsize}")


def decode_smaller(request: DecodeRequest, source: bytes) -> NDArray[Any]:
    """Return the words of a smaller picture in a JPEG 2000 codestream, as decode_words does those of the whole one.

    Its pixels are the whole one's at every second (fourth) place. Half way between two of them, nearly, lie the middles of two
    (four) of the whole one's, which is where a picture of half the sides has its own: there it is read by interpolation.
    """
    stream = get_frame(source, 0, number_of_frames=1)
    image = Jpeg2KImageFile(io.BytesIO(stream))
    step = 1 << request.halvings
    # Pillow rounds sides of 4 n + 1 down where the standard rounds up (ISO/IEC 15444-1 equation B-15).
    image._size = (-(-image.width // step) * step, -(-image.height // step) * step)
    image.reduce = request.halvings
    words = np.asarray(image)
    # Pillow gives unsigned values in the highest bits.
    n_bits = get_j2k_parameters(stream)["precision"]
    values = words.astype(np.int32) >> (8 * words.itemsize - n_bits)
    near, far = step + 1, step - 1
    for _ in range(2):
        following = np.concatenate([values[1:], values[-1:]])
        values = ((near * values + far * following + step) // (2 * step)).T
    low = 0
    if request.is_signed:
        values -= 1 << (n_bits - 1)
        low = -1 << (request.bits_stored - 1)
    # Beside an edge a smaller picture overshoots; where the codestream has bits to spare, beyond the header's.
    cut: NDArray[Any] = values.clip(low, low + (1 << request.bits_stored) - 1).astype(words.dtype)
    return cut


def _plugin(transfer_syntax_uid: str) -> str:
    """Return which of pydicom's plugins decodes.

    On the same pictures all plugins gave equal pixels. Pillow runs JPEG and JPEG 2000 because the runtime has it already
    and no damaged file ended it; gdcm the rest because it alone, of free licence, decodes lossless JPEG.
    """
    if transfer_syntax_uid == RLE:
        return "pydicom"
    return "pillow" if transfer_syntax_uid == JPEG_BASELINE or transfer_syntax_uid in JPEG_2000 else "gdcm"


if __name__ == "__main__":
    main()
