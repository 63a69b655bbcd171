import os
from pathlib import Path

import pytest
from pydicom import Dataset, dcmread
from pydicom.filebase import DicomBytesIO
from pydicom.filewriter import write_dataset
from pydicom.uid import ExplicitVRLittleEndian, SecondaryCaptureImageStorage

from benchmarks.rigs.node_rig import write_radiograph
from chexnet_deploy.dicom.node.config import Spool as SpoolSettings
from chexnet_deploy.dicom.node.inbox import (
    DONE,
    INCOMING,
    KEY_FILE,
    RECEIVED,
    Incoming,
    Kept,
    Outcome,
    Pseudonyms,
    Spool,
    Verdict,
)
from chexnet_deploy.dicom.node.pdu import STORE_RQ, Command
from chexnet_deploy.errors import NodeError

SETTINGS = SpoolSettings(max_mib=1, min_free_mib=1, remember=100)
ANSWERED = Outcome("answered", "0" * 16, "1" * 16)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "state").mkdir(mode=0o700)
    return tmp_path / "state"


def open_spool(folder: Path, settings: SpoolSettings = SETTINGS) -> Spool:
    return Spool.open(folder, settings, Pseudonyms.open(folder))


def encode(dataset: Dataset) -> bytes:
    out = DicomBytesIO()
    out.is_implicit_VR, out.is_little_endian = False, True
    write_dataset(out, dataset)
    return out.getvalue()


def begin(spool: Spool, dataset: Dataset) -> Incoming:
    command = Command(1, STORE_RQ, b"", str(dataset.SOPClassUID), str(dataset.SOPInstanceUID))
    return spool.begin(command, str(ExplicitVRLittleEndian))


def receive(spool: Spool, dataset: Dataset, content: bytes | None = None) -> Kept:
    incoming = begin(spool, dataset)
    whole = encode(dataset) if content is None else content
    for start in range(0, len(whole), 1000):
        incoming.write(whole[start : start + 1000])
    incoming.finish()
    taken = spool.take(incoming.token)
    assert taken is incoming
    return spool.keep(incoming)


def image(tmp_path: Path, seed: int) -> Dataset:
    return write_radiograph(tmp_path / "image.dcm", seed=seed)


def files(folder: Path) -> dict[str, int]:
    return {name: len(list((folder / name).iterdir())) for name in (INCOMING, RECEIVED, DONE)}


def test_received_image_is_a_dicom_file_equal_to_what_was_sent(folder: Path, tmp_path: Path) -> None:
    spool, sent = open_spool(folder), image(tmp_path, 1)
    assert receive(spool, sent).verdict is Verdict.STORED
    stored = spool.next_pending()
    assert stored is not None
    read = dcmread(stored.path)
    assert read == sent
    assert read.file_meta.TransferSyntaxUID == ExplicitVRLittleEndian
    assert read.file_meta.MediaStorageSOPInstanceUID == sent.SOPInstanceUID


def test_images_are_answered_in_order_of_arrival_also_after_opening_again(folder: Path, tmp_path: Path) -> None:
    spool = open_spool(folder)
    for seed in (3, 1, 2):
        receive(spool, image(tmp_path, seed))
    patients = []
    for _ in range(3):
        spool = open_spool(folder)
        stored = spool.next_pending()
        assert stored is not None
        patients.append(dcmread(stored.path).PatientID)
        spool.finish(stored, ANSWERED)
    assert patients == ["ID-3", "ID-1", "ID-2"]
    assert spool.next_pending() is None
    assert files(folder) == {INCOMING: 0, RECEIVED: 0, DONE: 3}


@pytest.mark.parametrize("is_answered", [False, True])
@pytest.mark.parametrize("is_opened_again", [False, True])
def test_same_image_again_is_acknowledged_and_not_kept_twice(
    folder: Path, tmp_path: Path, is_answered: bool, is_opened_again: bool
) -> None:
    spool = open_spool(folder)
    receive(spool, image(tmp_path, 1))
    stored = spool.next_pending()
    assert stored is not None
    if is_answered:
        spool.finish(stored, ANSWERED)
    if is_opened_again:
        spool = open_spool(folder)
    kept = receive(spool, image(tmp_path, 1))
    assert (kept.verdict, kept.verdict.status) == (Verdict.AGAIN, 0x0000)
    assert (spool.n_pending, files(folder)[INCOMING]) == (0 if is_answered else 1, 0)


@pytest.mark.parametrize(
    "change",
    [{"PatientID": "CORRECTED"}, {"ViewPosition": "AP"}, {"AccessionNumber": "A2"}, {"PixelData": bytes(96 * 96 * 2)}],
)
@pytest.mark.parametrize("is_answered", [False, True])
def test_another_data_set_under_a_used_uid_is_kept_too(
    folder: Path, tmp_path: Path, change: dict[str, object], is_answered: bool
) -> None:
    spool, first = open_spool(folder), image(tmp_path, 1)
    receive(spool, first)
    if is_answered:
        stored = spool.next_pending()
        assert stored is not None
        spool.finish(stored, ANSWERED)
    second = image(tmp_path, 1)
    second.update(change)
    kept = receive(spool, second)
    assert (kept.verdict, kept.verdict.status) == (Verdict.CHANGED, 0x0000)
    assert spool.n_pending == (1 if is_answered else 2)
    for again in (first, second):  # each is known now, after opening again too
        assert receive(open_spool(folder), again).verdict is Verdict.AGAIN
    assert open_spool(folder).outcomes(kept.instance) == ([ANSWERED] if is_answered else [])


@pytest.mark.parametrize("word", ["view", "blank", "worker-lost"])
def test_a_refused_image_that_comes_again_is_judged_anew(folder: Path, tmp_path: Path, word: str) -> None:
    spool = open_spool(folder)
    for _ in range(2):
        assert receive(spool, image(tmp_path, 1)).verdict is Verdict.STORED
        assert receive(spool, image(tmp_path, 1)).verdict is Verdict.AGAIN  # it waits
        stored = spool.next_pending()
        assert stored is not None
        spool.finish(stored, Outcome(word))
        spool = open_spool(folder)


@pytest.mark.parametrize("word", ["answered", "view", "not-a-frontal-chest"])
def test_what_became_of_images_is_remembered_until_it_is_forgotten(folder: Path, tmp_path: Path, word: str) -> None:
    spool = open_spool(folder)
    kept = receive(spool, image(tmp_path, 1))
    stored = spool.next_pending()
    assert stored is not None
    spool.finish(stored, Outcome(word, "ab", ""))
    for opened in (spool, open_spool(folder)):
        assert opened.outcomes(kept.instance) == [Outcome(word, "ab", "")]
        assert opened.counts() == {word: 1}
    assert spool.forget(kept.instance) == 1
    assert spool.forget(kept.instance) == 0
    assert open_spool(folder).outcomes(kept.instance) == []
    assert receive(spool, image(tmp_path, 1)).verdict is Verdict.STORED


@pytest.mark.parametrize(
    "sop_class", ["1.2.840.10008.5.1.4.1.1.88.34", "1.2.840.10008.5.1.4.1.1.11.1", "1.2.840.10008.5.1.4.1.1.88.59"]
)
def test_what_lies_beside_radiographs_is_dropped_with_a_warning(folder: Path, sop_class: str) -> None:
    spool = open_spool(folder)
    incoming = spool.begin(Command(1, STORE_RQ, b"", sop_class, "1.2.3"), str(ExplicitVRLittleEndian))
    incoming.write(b"whatever")
    assert files(folder)[INCOMING] == 0
    incoming.finish()
    taken = spool.take(incoming.token)
    assert taken is not None
    kept = spool.keep(taken)
    assert (kept.verdict, kept.verdict.status) == (Verdict.DROPPED, 0xB006)
    assert files(folder) == {INCOMING: 0, RECEIVED: 0, DONE: 0}


@pytest.mark.parametrize(
    ("modality", "verdict"),
    [
        ("CR", Verdict.STORED),
        ("DX", Verdict.STORED),
        ("OT", Verdict.DROPPED),
        ("SC", Verdict.DROPPED),
        ("", Verdict.DROPPED),
    ],
)
def test_a_secondary_capture_is_an_image_where_its_modality_is(
    folder: Path, tmp_path: Path, modality: str, verdict: Verdict
) -> None:
    sent = image(tmp_path, 1)
    sent.SOPClassUID, sent.Modality = SecondaryCaptureImageStorage, modality
    assert receive(open_spool(folder), sent).verdict is verdict
    assert files(folder)[RECEIVED] == (verdict is Verdict.STORED)


def test_data_set_of_another_uid_than_announced_is_refused(folder: Path, tmp_path: Path) -> None:
    spool, sent = open_spool(folder), image(tmp_path, 1)
    other = image(tmp_path, 2)
    kept = receive(spool, sent, encode(other))
    assert (kept.verdict, kept.verdict.status) == (Verdict.MISMATCH, 0xA900)
    assert files(folder) == {INCOMING: 0, RECEIVED: 0, DONE: 0}


@pytest.mark.parametrize("content", [b"", b"nonsense", bytes(5000)])
def test_what_is_no_data_set_is_refused(folder: Path, tmp_path: Path, content: bytes) -> None:
    kept = receive(open_spool(folder), image(tmp_path, 1), content)
    assert (kept.verdict, kept.verdict.status) == (Verdict.UNREADABLE, 0xC000)
    assert files(folder)[INCOMING] == 0


def test_low_disk_and_full_spool_are_answered_a700_and_nothing_is_written(folder: Path, tmp_path: Path) -> None:
    low = open_spool(folder, SpoolSettings(min_free_mib=16 * 1024 * 1024))
    assert not low.has_room()
    kept = receive(low, image(tmp_path, 1))
    assert (kept.verdict, kept.verdict.status) == (Verdict.NO_ROOM, 0xA700)
    spool = open_spool(folder)
    big = write_radiograph(tmp_path / "big.dcm", seed=1, side_px=800)
    assert receive(spool, big).verdict is Verdict.STORED  # 1.2 MiB: over the limit only once it is there
    assert receive(spool, image(tmp_path, 2)).verdict is Verdict.NO_ROOM
    stored = spool.next_pending()
    assert stored is not None
    spool.finish(stored, ANSWERED)
    assert receive(spool, image(tmp_path, 2)).verdict is Verdict.STORED


@pytest.mark.parametrize("failing", ["fsync", "rename"])
def test_disk_that_fails_is_answered_a700(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    spool, sent = open_spool(folder), image(tmp_path, 1)
    with monkeypatch.context() as patch:
        patch.setattr(*{"fsync": (os, "fsync"), "rename": (Path, "rename")}[failing], fail)
        assert receive(spool, sent).verdict is Verdict.NO_ROOM
    assert files(folder) == {INCOMING: 0, RECEIVED: 0, DONE: 0}
    assert receive(spool, sent).verdict is Verdict.STORED


def test_transfer_that_was_given_up_leaves_nothing(folder: Path, tmp_path: Path) -> None:
    spool = open_spool(folder)
    incoming = begin(spool, image(tmp_path, 1))
    incoming.write(b"half")
    incoming.discard()
    assert files(folder)[INCOMING] == 0
    assert spool.take(incoming.token) is None


def test_what_a_kill_left_is_set_right(folder: Path, tmp_path: Path) -> None:
    spool = open_spool(folder)
    receive(spool, image(tmp_path, 1))
    (folder / INCOMING / "0123").write_bytes(b"half")
    stored = spool.next_pending()
    assert stored is not None
    (folder / DONE / f"{stored.name}.view..").touch()  # killed between the marker and the removal
    spool = open_spool(folder)
    assert spool.next_pending() is None
    assert files(folder) == {INCOMING: 0, RECEIVED: 0, DONE: 1}


def test_the_oldest_answered_images_are_forgotten(folder: Path, tmp_path: Path) -> None:
    spool = open_spool(folder, SETTINGS.model_copy(update={"remember": 3}))
    for seed in range(6):
        receive(spool, image(tmp_path, seed))
        stored = spool.next_pending()
        assert stored is not None
        spool.finish(stored, ANSWERED)
    assert files(folder)[DONE] == 3
    assert receive(spool, image(tmp_path, 0)).verdict is Verdict.STORED
    assert receive(spool, image(tmp_path, 4)).verdict is Verdict.AGAIN


def test_names_hold_no_uid(folder: Path, tmp_path: Path) -> None:
    spool, sent = open_spool(folder), image(tmp_path, 1)
    receive(spool, sent)
    assert all(str(sent.SOPInstanceUID) not in path.name for path in folder.rglob("*"))


@pytest.mark.parametrize("path", [KEY_FILE, RECEIVED])
def test_what_others_may_read_is_refused(folder: Path, path: str) -> None:
    open_spool(folder)
    (folder / path).chmod(0o755)
    with pytest.raises(NodeError, match="0755"):
        open_spool(folder)


def test_foreign_file_is_refused(folder: Path) -> None:
    open_spool(folder)
    (folder / RECEIVED / "holiday.dcm").touch()
    with pytest.raises(NodeError, match="holiday"):
        open_spool(folder)


@pytest.mark.parametrize("uid", ["1.02.3", "1..2", ".", "0", "1" * 64])
def test_odd_uids_are_kept_as_they_are(folder: Path, tmp_path: Path, uid: str) -> None:
    spool = open_spool(folder)
    sent = image(tmp_path, 1)
    content = encode(sent).replace(encode_uid(str(sent.SOPInstanceUID)), encode_uid(uid))
    incoming = spool.begin(Command(1, STORE_RQ, b"", str(sent.SOPClassUID), uid), str(ExplicitVRLittleEndian))
    incoming.write(content)
    incoming.finish()
    taken = spool.take(incoming.token)
    assert taken is not None
    assert spool.keep(taken).verdict is Verdict.STORED
    stored = spool.next_pending()
    assert stored is not None
    assert uid.encode() in stored.path.read_bytes()


def encode_uid(uid: str) -> bytes:
    """Return a SOP Instance UID's element, explicit VR little endian."""
    value = uid.encode() + b"\0" * (len(uid) % 2)
    return b"\x08\0\x18\0UI" + len(value).to_bytes(2, "little") + value
