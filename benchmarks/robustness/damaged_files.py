"""Whole image files, and copies of them damaged by a seeded generator: bytes, lengths, elements, codestreams."""

import io
import random
import struct
from typing import Literal

from PIL import Image

from benchmarks.rigs.synthetic_dicom import COMPRESSED, WORDS, make_dicom
from chexnet_deploy.images.dicom.header import read_header
from chexnet_deploy.inputs import ReportRecord

# What a length, a count or a side is set to by somebody who means ill.
_LIES = (
    0,
    1,
    2,
    7,
    0x7F,
    0x80,
    0xFF,
    0x100,
    0x7FFF,
    0x8000,
    0xFFFE,
    0xFFFF,
    0x7FFFFFFF,
    0x80000000,
    0xFFFFFFFE,
    0xFFFFFFFF,
)


class Seed(ReportRecord):
    """A whole file and what it looks like.

    Attributes:
        name: for the result.
        content: its bytes.
        starts: where its elements, chunks or segments begin: edits there change the structure and not one pixel.
        codestream_at: where compressed DICOM pixels begin; 0 where there are none.
    """

    name: str
    content: bytes
    starts: tuple[int, ...]
    codestream_at: int


def synthetic_seeds() -> list[Seed]:
    """Return a PNG of 8 and of 16 bits, a JPEG, and a DICOM file in every transfer syntax."""
    bytes_8 = (WORDS // 16).astype("u1")
    files: dict[str, bytes] = {}
    for name, pixels, kind in (("png8", bytes_8, "PNG"), ("png16", WORDS, "PNG"), ("jpeg", bytes_8, "JPEG")):
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, kind)
        files[name] = buffer.getvalue()
    for syntax in ("1.2.840.10008.1.2", "1.2.840.10008.1.2.1", *COMPRESSED):
        words = bytes_8 if syntax.endswith(".50") else WORDS
        files[syntax] = make_dicom(words, {"WindowCenter": 2000, "WindowWidth": 2500}, syntax=syntax)
    return [seed_of(name, content) for name, content in files.items()]


def seed_of(name: str, content: bytes) -> Seed:
    """Return a file with what the generator must know of it."""
    if content[128:132] == b"DICM":
        header = read_header(name, content)
        starts = tuple(_element_starts(content, len(header.raw), is_explicit=header.transfer_syntax_uid[-2:] != ".2"))
        return Seed(
            name=name, content=content, starts=starts, codestream_at=len(header.raw) if header.is_compressed else 0
        )
    marks = (
        (b"IHDR", b"IDAT", b"IEND")
        if content.startswith(b"\x89PNG")
        else (b"\xff\xdb", b"\xff\xc0", b"\xff\xc4", b"\xff\xda")
    )
    starts = tuple(sorted(content.index(mark) - 4 * mark.isalpha() for mark in marks))
    return Seed(name=name, content=content, starts=starts, codestream_at=0)


def _element_starts(content: bytes, end: int, *, is_explicit: bool) -> list[int]:
    """Return where the top-level elements begin; a sequence counts as one."""
    starts, at = [], 132
    while at < end:
        starts.append(at)
        group = struct.unpack_from("<H", content, at)[0]
        if not is_explicit and group != 2:
            at += 8 + int(struct.unpack_from("<I", content, at + 4)[0])
        elif content[at + 4 : at + 6] in (b"OB", b"OW", b"SQ", b"UN", b"UT", b"UC", b"UR"):
            at += 12 + int(struct.unpack_from("<I", content, at + 8)[0])
        else:
            at += 8 + int(struct.unpack_from("<H", content, at + 6)[0])
        if at > end:  # of undefined length: what follows is left to the edits of single bytes
            break
    return [*starts, end] if end < len(content) else starts


def damage(seed: Seed, chance: random.Random) -> bytes:
    """Return a copy with one to three faults."""
    content = bytearray(seed.content)
    faults = [_change_bytes, _cut, _lie, _edit_element, _drop_element, _repeat_element, _move]
    if seed.codestream_at:
        faults += [_damage_codestream] * 3
    for _ in range(chance.choice((1, 1, 1, 2, 3))):
        chance.choice(faults)(content, seed, chance)
    return bytes(content)


def _change_bytes(content: bytearray, seed: Seed, chance: random.Random) -> None:
    for _ in range(chance.choice((1, 2, 8))):
        if content:
            content[chance.randrange(len(content))] ^= chance.randrange(1, 256)


def _cut(content: bytearray, seed: Seed, chance: random.Random) -> None:
    del content[chance.randrange(len(content) + 1) :]


def _lie(content: bytearray, seed: Seed, chance: random.Random) -> None:
    """Overwrite a number near the start of an element or chunk."""
    width = chance.choice((1, 2, 4))
    order: Literal["little", "big"] = chance.choice(("little", "big"))
    at = chance.choice(seed.starts) + chance.randrange(0, 20)
    if at + width <= len(content):
        content[at : at + width] = (chance.choice(_LIES) % 256**width).to_bytes(width, order)


def _edit_element(content: bytearray, seed: Seed, chance: random.Random) -> None:
    """Give an element another tag or VR, so that its value means something else."""
    at = chance.choice(seed.starts)
    if at + 6 <= len(content):
        if chance.random() < 0.5:
            content[at + 4 : at + 6] = chance.choice((b"SQ", b"UN", b"OB", b"US", b"DS", b"XX", b"\0\0"))
        else:
            other = chance.choice(seed.starts)
            content[at : at + 4] = seed.content[other : other + 4]


def _drop_element(content: bytearray, seed: Seed, chance: random.Random) -> None:
    first, last = _span(seed, chance)
    del content[first:last]


def _repeat_element(content: bytearray, seed: Seed, chance: random.Random) -> None:
    first, last = _span(seed, chance)
    times = chance.choice((1, 2, 500))
    # The generator's own copies must not be what fills the memory.
    content[first:first] = seed.content[first:last] * min(times, max(1, 2**21 // (last - first + 1)))


def _move(content: bytearray, seed: Seed, chance: random.Random) -> None:
    first, last = _span(seed, chance)
    to = chance.choice(seed.starts)
    content[to:to] = seed.content[first:last]


def _span(seed: Seed, chance: random.Random) -> tuple[int, int]:
    which = chance.randrange(len(seed.starts))
    end = seed.starts[which + 1] if which + 1 < len(seed.starts) else len(seed.content)
    return seed.starts[which], end


def _damage_codestream(content: bytearray, seed: Seed, chance: random.Random) -> None:
    """Change bytes of compressed pixels, half of the time near their own headers: what reaches a codec."""
    start = seed.codestream_at + 28  # the element, the offset table and the fragment have headers of their own
    end = min(len(content), start + 120) if chance.random() < 0.5 else len(content)
    for _ in range(chance.choice((1, 2, 8))):
        if start < end:
            content[chance.randrange(start, end)] ^= chance.randrange(1, 256)
