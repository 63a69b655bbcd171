"""Which changes make another image, and which don't."""

from collections.abc import Callable

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence

from chexnet_deploy.dicom.results.identity import header_sha256


@pytest.mark.parametrize("keyword", ["PatientID", "AccessionNumber", "StudyInstanceUID", "PatientBirthDate"])
def test_another_value_is_another_header(header_of: Callable[..., Dataset], keyword: str) -> None:
    assert header_sha256(header_of()) != header_sha256(header_of(**{keyword: b"1"}))
    assert header_sha256(header_of()) != header_sha256(header_of(**{keyword: None}))


@pytest.mark.parametrize(
    ("keyword", "value"),
    [
        ("ViewPosition", b"PA"),
        ("InstitutionName", b"X"),
        ("SpecificCharacterSet", b"ISO_IR 100"),
        ("WindowCenter", b"7"),
    ],
)
def test_an_added_value_is_another_header(header_of: Callable[..., Dataset], keyword: str, value: bytes) -> None:
    assert header_sha256(header_of()) != header_sha256(header_of(**{keyword: value}))


@pytest.mark.parametrize(
    ("keyword", "value"),
    [
        ("PatientID", b"CANARY-4711 \0"),  # padding
        ("DerivationDescription", b"Lossless JPEG compression"),
        ("RetrieveAETitle", b"ARCHIVE"),
        ("LossyImageCompression", b"00"),
        ("DataSetTrailingPadding", b"\0\0\0\0"),
    ],
)
def test_what_changes_on_the_way_does_not_count(header_of: Callable[..., Dataset], keyword: str, value: bytes) -> None:
    assert header_sha256(header_of()) == header_sha256(header_of(**{keyword: value}))


def test_private_elements_and_group_lengths_do_not_count(header_of: Callable[..., Dataset]) -> None:
    header = header_of()
    header.private_block(0x0011, "AN ARCHIVE", create=True).add_new(1, "LO", "its own")
    header.add_new(0x00100000, "UL", 42)
    assert header_sha256(header) == header_sha256(header_of())


@pytest.mark.parametrize("changed", ["other code", "one more item", "no item"])
def test_what_is_inside_a_sequence_counts(header_of: Callable[..., Dataset], changed: str) -> None:
    def coded(*values: str) -> Dataset:
        header = header_of()
        items = [Dataset() for _ in values]
        for item, value in zip(items, values, strict=True):
            item.CodeValue = value
        header.ViewCodeSequence = Sequence(items)
        return header

    others = {"other code": coded("B"), "one more item": coded("A", "B"), "no item": coded()}
    assert header_sha256(coded("A")) == header_sha256(coded("A"))
    assert header_sha256(coded("A")) != header_sha256(others[changed])


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_whatever_stands_in_a_header_is_compared_silently(
    header_of: Callable[..., Dataset], malformed: st.SearchStrategy[dict[str, bytes | None]], data: st.DataObject
) -> None:
    drawn = data.draw(malformed)
    header = header_of(**drawn)
    assert header_sha256(header) == header_sha256(header_of(**drawn))  # and silently: a warning is an error here
    assert header_sha256(header) == header_sha256(header)


@pytest.mark.parametrize(
    "content", [b"nonsense", b"\xfe\xff\x00\xe0\xff\xff\xff\x00AB", b"\xfe\xff\x00\xe0\x02\x00\x00\x00AB"]
)
@pytest.mark.filterwarnings("ignore")
def test_what_is_no_sequence_is_compared_by_its_bytes(header_of: Callable[..., Dataset], content: bytes) -> None:
    odd = header_of(ViewCodeSequence=content)
    assert header_sha256(odd) == header_sha256(header_of(ViewCodeSequence=content))
    assert header_sha256(odd) != header_sha256(header_of())
