import os
from pathlib import Path

import pytest
from pydicom import Dataset, dcmread
from pydicom.filebase import DicomBytesIO
from pydicom.filewriter import write_dataset
from pydicom.uid import ExplicitVRLittleEndian

from benchmarks.rigs.node_rig import write_radiograph
from chexnet_deploy.dicom.node.config import Spool as SpoolSettings
from chexnet_deploy.dicom.node.inbox import (
    DONE,
    INCOMING,
    KEY_FILE,
    RECEIVED,
    Incoming,
    Kept,
    Pseudonyms,
    Spool,
    Verdict,
)
from chexnet_deploy.dicom.node.pdu import STORE_RQ, Command
from chexnet_deploy.errors import NodeError

SETTINGS = SpoolSettings(max_mib=1, min_free_mib=1, remember=100)


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
        spool.finish(stored)
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
        spool.finish(stored)
    if is_opened_again:
        spool = open_spool(folder)
    kept = receive(spool, image(tmp_path, 1))
    assert (kept.verdict, kept.verdict.status) == (Verdict.AGAIN, 0x0000)
    assert (spool.n_pending, files(folder)[INCOMING]) == (0 if is_answered else 1, 0)


def test_other_pixels_under_a_used_uid_are_refused_and_the_first_kept(folder: Path, tmp_path: Path) -> None:
    spool, first, second = open_spool(folder), image(tmp_path, 1), image(tmp_path, 2)
    second.SOPInstanceUID = first.SOPInstanceUID
    receive(spool, first)
    kept = receive(spool, second)
    assert (kept.verdict, kept.verdict.status) == (Verdict.CONFLICT, 0xC111)
    stored = spool.next_pending()
    assert stored is not None
    assert dcmread(stored.path).PatientID == "ID-1"
    assert spool.n_pending == 1


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
    spool.finish(stored)
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
    (folder / DONE / stored.name).touch()  # killed between the marker and the removal
    spool = open_spool(folder)
    assert spool.next_pending() is None
    assert files(folder) == {INCOMING: 0, RECEIVED: 0, DONE: 1}


def test_the_oldest_answered_images_are_forgotten(folder: Path, tmp_path: Path) -> None:
    spool = open_spool(folder, SETTINGS.model_copy(update={"remember": 3}))
    for seed in range(6):
        receive(spool, image(tmp_path, seed))
        stored = spool.next_pending()
        assert stored is not None
        spool.finish(stored)
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
