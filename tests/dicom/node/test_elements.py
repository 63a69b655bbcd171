import contextlib
import hashlib
import struct
from io import BytesIO

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydicom import Dataset
from pydicom.encaps import encapsulate
from pydicom.filebase import DicomBytesIO
from pydicom.filewriter import write_dataset
from pydicom.sequence import Sequence

from chexnet_deploy.dicom.node.elements import MAX_ELEMENTS, ElementFault, Identity, identify


def image() -> Dataset:
    made = Dataset()
    made.SOPClassUID, made.SOPInstanceUID, made.Modality = "1.2.840.10008.5.1.4.1.1.1", "1.2.3", "CR"
    made.PatientName = "A^B"
    made.Rows = made.Columns = 4
    made.BitsAllocated = 16
    made.PixelData = np.arange(16, dtype=np.uint16).tobytes()
    made["PixelData"].VR = "OW"
    return made


def encode(dataset: Dataset, *, is_implicit: bool = False) -> bytes:
    out = DicomBytesIO()
    out.is_implicit_VR, out.is_little_endian = is_implicit, True
    write_dataset(out, dataset)
    return out.getvalue()


def read(content: bytes, *, is_implicit: bool = False) -> Identity:
    return identify(BytesIO(content), len(content), is_implicit=is_implicit)


@pytest.mark.parametrize("is_implicit", [False, True])
def test_identity_of_a_plain_image(is_implicit: bool) -> None:
    content = encode(image(), is_implicit=is_implicit)
    found = read(content, is_implicit=is_implicit)
    assert found == Identity("1.2.840.10008.5.1.4.1.1.1", "1.2.3", "CR", hashlib.sha256(content).digest())


@pytest.mark.parametrize("is_implicit", [False, True])
@pytest.mark.parametrize("has_undefined_length", [False, True])
def test_sequences_are_passed_over(is_implicit: bool, has_undefined_length: bool) -> None:
    plain, nested = image(), image()
    inner = Dataset()
    inner.SOPInstanceUID, inner.Modality = "9.9.9", "SR"  # not the image's own
    inner.PixelData = b"\0\0"
    inner["PixelData"].VR = "OW"
    inner.is_undefined_length_sequence_item = has_undefined_length
    outer = Dataset()
    outer.ReferencedImageSequence = Sequence([inner])
    outer["ReferencedImageSequence"].is_undefined_length = has_undefined_length
    nested.SourceImageSequence = Sequence([outer, outer])
    nested["SourceImageSequence"].is_undefined_length = has_undefined_length
    found, expected = (read(encode(each, is_implicit=is_implicit), is_implicit=is_implicit) for each in (nested, plain))
    assert found[:3] == expected[:3]


def test_encapsulated_pixels_are_found() -> None:
    compressed = image()
    compressed.PixelData = encapsulate([b"\xff\xd8\xff\xd9"])
    compressed["PixelData"].VR, compressed["PixelData"].is_undefined_length = "OB", True
    content = encode(compressed)
    assert read(content).data_set_sha256 == hashlib.sha256(content).digest()


@pytest.mark.parametrize("changed", [{"PatientName": "B^C"}, {"Modality": "DX"}, {"PixelData": bytes(31) + b"\x01"}])
def test_one_change_anywhere_makes_another_data_set(changed: dict[str, object]) -> None:
    other = image()
    for keyword, value in changed.items():
        setattr(other, keyword, value)
    assert read(encode(other)).data_set_sha256 != read(encode(image())).data_set_sha256


@pytest.mark.parametrize("cut", [1, 10, 40, 60])
def test_cut_short_is_refused(cut: int) -> None:
    # pydicom reads a value that declares more bytes than are left, and says nothing.
    with pytest.raises(ElementFault):
        read(encode(image())[:-cut])


def test_no_pixels_are_refused() -> None:
    other = image()
    del other.PixelData
    with pytest.raises(ElementFault, match="no-pixel-data"):
        read(encode(other))


def test_falling_tags_are_refused() -> None:
    first = struct.pack("<HH2sH", 0x0010, 0x0020, b"LO", 2) + b"AB"
    with pytest.raises(ElementFault, match="out-of-order"):
        read(first + first)


def test_depth_and_number_are_bounded() -> None:
    open_sequence = struct.pack("<HH2sHI", 0x0008, 0x2112, b"SQ", 0, 0xFFFFFFFF) + struct.pack(
        "<HHI", 0xFFFE, 0xE000, 0xFFFFFFFF
    )
    with pytest.raises(ElementFault, match="too-deep"):
        read(open_sequence * 5000)
    small = b"".join(struct.pack("<HH2sH", 0x0011, n, b"LO", 0) for n in range(MAX_ELEMENTS))
    with pytest.raises(ElementFault, match="too-many-elements"):
        read(small)


@settings(max_examples=300)
@given(st.data())
def test_damaged_data_sets_are_read_or_refused(data: st.DataObject) -> None:
    content = bytearray(encode(image()))
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    for is_implicit in (False, True):
        with contextlib.suppress(ElementFault):
            read(bytes(content), is_implicit=is_implicit)
