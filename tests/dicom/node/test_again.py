"""An image that comes again: as it was, corrected, in another encoding; and its results, which can be sent again."""

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from pydicom import Dataset, dcmread
from pydicom.uid import ImplicitVRLittleEndian, RLELossless, SecondaryCaptureImageStorage

from benchmarks.rigs.node_rig import NodeProcess, Pacs, find_dcmtk, store, write_radiograph
from chexnet_deploy.bundle.bundle import Bundle
from tests.cli.test_cli import chexnet
from tests.dicom.node.conftest import dcmtk
from tests.dicom.node.test_service import audited, wait_until


@pytest.fixture(scope="module")
def running(bundles: dict[str, Bundle], tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[NodeProcess, Pacs]]:
    """One node for all, as each test has images of its own."""
    folder = tmp_path_factory.mktemp("again")
    dcmtk("storescp")
    node = NodeProcess(folder / "node", bundles["fp32"].path).start()
    pacs = Pacs(folder / "pacs", node.pacs_port, find_dcmtk("storescp") or "").start()
    yield node, pacs
    pacs.stop()
    node.kill()


def instance_of(node: NodeProcess, uid: str) -> list[dict[str, object]]:
    """Return what `audit find` says of an image."""
    done = chexnet("audit", "find", node.state / "audit.jsonl", "--uid", uid, "--json")
    assert done.returncode == 0, done.stderr
    lines: list[dict[str, object]] = json.loads(done.stdout)
    return lines


def of_patient(pacs: Pacs, patient: str) -> dict[str, Dataset]:
    return {uid: document for uid, document in pacs.received().items() if document.PatientID == patient}


def n_done(node: NodeProcess) -> int:
    return len(list((node.state / "done").iterdir()))


def send(node: NodeProcess, image: Dataset) -> None:
    """Send an image and wait until the node has done with it."""
    before = n_done(node)
    assert store(node.port, [image]) == [0]
    wait_until(lambda: n_done(node) == before + 1)


@pytest.mark.parametrize(
    ("seed", "keyword", "value", "differs"),
    [
        (1, "PatientID", "CORRECTED", "header"),
        (2, "AccessionNumber", "A-2", "header"),
        (3, "ViewPosition", "AP", "header"),
        (4, "PixelData", None, "pixels"),
    ],
)
def test_a_changed_image_is_answered_anew_and_the_log_says_so(
    running: tuple[NodeProcess, Pacs], tmp_path: Path, seed: int, keyword: str, value: str | None, differs: str
) -> None:
    node, pacs = running
    image = write_radiograph(tmp_path / "a.dcm", seed=seed)
    send(node, image)
    first = image.PixelData[0] ^ 1  # the lowest bit of one pixel
    setattr(image, keyword, bytes([first]) + image.PixelData[1:] if value is None else value)
    send(node, image)
    study = image.StudyInstanceUID
    wait_until(lambda: len([each for each in pacs.received().values() if each.StudyInstanceUID == study]) == 4)
    if keyword == "PatientID":
        assert len(of_patient(pacs, "CORRECTED")) == 2
    lines = instance_of(node, str(image.SOPInstanceUID))
    assert [line.get("verdict") for line in lines if line["event"] == "received"] == ["stored", "changed"]
    (changed,) = [line for line in lines if line["event"] == "changed"]
    assert (changed["differs"], changed["before"]) == (differs, "answered")
    assert [line["event"] for line in lines].count("answered") == 2
    assert store(node.port, [image]) == [0]  # again, as it is now
    assert instance_of(node, str(image.SOPInstanceUID))[-1]["verdict"] == "again"


@pytest.mark.parametrize(("seed", "found", "corrected"), [(11, "", "PA"), (12, "LL", "AP"), (13, "RL", "PA")])
def test_a_refused_image_that_comes_corrected_is_judged_anew(
    running: tuple[NodeProcess, Pacs], tmp_path: Path, seed: int, found: str, corrected: str
) -> None:
    node, pacs = running
    image = write_radiograph(tmp_path / "a.dcm", seed=seed)
    image.ViewPosition = found
    send(node, image)
    wait_until(lambda: len(of_patient(pacs, f"ID-{seed}")) == 1)
    (refusal,) = of_patient(pacs, f"ID-{seed}").values()
    assert (refusal.ImageComments, refusal.StudyInstanceUID) == ("No AI result: view", image.StudyInstanceUID)
    image.ViewPosition = corrected
    send(node, image)
    wait_until(lambda: len(of_patient(pacs, f"ID-{seed}")) == 3)
    events = [line["event"] for line in instance_of(node, str(image.SOPInstanceUID))]
    assert events.index("refused") < events.index("changed") < events.index("answered")


@pytest.mark.parametrize(("seed", "encoding"), [(21, "implicit"), (22, "rle"), (23, "private"), (24, "jpeg-ls")])
def test_the_same_image_in_another_encoding_is_no_other(
    running: tuple[NodeProcess, Pacs], tmp_path: Path, seed: int, encoding: str
) -> None:
    node, pacs = running
    path = tmp_path / "a.dcm"
    image = write_radiograph(path, seed=seed)
    send(node, image)
    if encoding == "implicit":
        image.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian
        image.save_as(path, implicit_vr=True, little_endian=True, enforce_file_format=True)
    elif encoding == "rle":
        image.compress(RLELossless, generate_instance_uid=False)
        image.save_as(path, enforce_file_format=True)
    elif encoding == "private":
        image.private_block(0x0011, "AN ARCHIVE", create=True).add_new(1, "LO", "its own")
        image.save_as(path, enforce_file_format=True)
    else:
        subprocess.run([dcmtk("dcmcjpls"), path, path], check=True)
    send(node, dcmread(path))
    lines = instance_of(node, str(image.SOPInstanceUID))
    assert [line["event"] for line in lines if line["event"] in ("answered", "changed", "same-image")] == [
        "answered",
        "same-image",
    ]
    wait_until(lambda: len(of_patient(pacs, f"ID-{seed}")) >= 2)  # done is before delivered
    assert len(of_patient(pacs, f"ID-{seed}")) == 2


@pytest.mark.parametrize(("seed", "modality", "status"), [(51, "CR", 0), (52, "DX", 0), (53, "OT", 0xB006)])
def test_a_secondary_capture_of_a_radiograph_is_answered(
    running: tuple[NodeProcess, Pacs], tmp_path: Path, seed: int, modality: str, status: int
) -> None:
    node, pacs = running
    image = write_radiograph(tmp_path / "a.dcm", seed=seed)
    image.SOPClassUID, image.Modality = SecondaryCaptureImageStorage, modality
    assert store(node.port, [image]) == [status]
    if status == 0:
        wait_until(lambda: len(of_patient(pacs, f"ID-{seed}")) == 2)
        # Our own results come back with their study.
        assert store(node.port, list(of_patient(pacs, f"ID-{seed}").values())) == [0xB006, 0xB006]
    else:
        assert [line["verdict"] for line in instance_of(node, str(image.SOPInstanceUID))] == ["dropped"]


@pytest.mark.parametrize("seed", [31, 32, 33])
def test_results_are_sent_again_on_demand(running: tuple[NodeProcess, Pacs], tmp_path: Path, seed: int) -> None:
    node, pacs = running
    image = write_radiograph(tmp_path / "a.dcm", seed=seed, body_part="HAND" if seed == 33 else "CHEST")
    send(node, image)
    n_documents = 1 if seed == 33 else 2
    wait_until(lambda: len(of_patient(pacs, f"ID-{seed}")) == n_documents)
    sent = of_patient(pacs, f"ID-{seed}")
    for path in pacs.paths().values():
        if dcmread(path).PatientID == f"ID-{seed}":
            path.unlink()  # a PACS that lost them
    done = chexnet("node", "resend", node.folder / "node.toml", "--uid", image.SOPInstanceUID)
    assert (done.returncode, done.stdout) == (0, f"{n_documents} documents are sent again\n")
    wait_until(lambda: of_patient(pacs, f"ID-{seed}") == sent)
    assert "resend" in [line["event"] for line in instance_of(node, str(image.SOPInstanceUID))]


def test_an_image_that_nobody_sent_has_nothing_to_be_sent_again(running: tuple[NodeProcess, Pacs]) -> None:
    done = chexnet("node", "resend", running[0].folder / "node.toml", "--uid", "1.2.3.4.5")
    assert (done.returncode, done.stdout) == (2, "")
    assert "has answered no image of this UID" in done.stderr


def test_what_is_not_kept_is_answered_again_when_the_image_comes_again(
    bundles: dict[str, Bundle], tmp_path: Path
) -> None:
    node = NodeProcess(tmp_path / "node", bundles["fp32"].path, overrides="\n[outbox]\nkeep_mib = 0\n").start()
    pacs = Pacs(tmp_path / "pacs", node.pacs_port, dcmtk("storescp")).start()
    try:
        image = write_radiograph(tmp_path / "a.dcm", seed=1)
        send(node, image)
        wait_until(lambda: len(pacs.received()) == len(audited(node, "delivered")) == 2)
        sent = set(pacs.received())
        for path in pacs.paths().values():
            path.unlink()
        done = chexnet("node", "resend", node.folder / "node.toml", "--uid", image.SOPInstanceUID)
        assert done.returncode == 0
        assert "send the node the image" in done.stdout
        send(node, image)
        wait_until(lambda: set(pacs.received()) == sent)  # under the same UIDs
    finally:
        pacs.stop()
        node.kill()


def test_status_says_what_waits_what_was_refused_and_why(running: tuple[NodeProcess, Pacs], tmp_path: Path) -> None:
    node, _ = running
    for seed, part in ((41, "KNEE"), (42, "CHEST")):
        send(node, write_radiograph(tmp_path / "a.dcm", seed=seed, body_part=part))
    found = json.loads(chexnet("node", "status", node.folder / "node.toml", "--json").stdout)
    assert found["is_ready"]
    assert found["images"]["waiting"] == 0
    assert found["images"]["refused"]["body-part"] >= 1
    assert found["images"]["answered"] >= 1
    assert set(found["destinations"]) == {"PACS"}
    told = chexnet("node", "status", node.folder / "node.toml").stdout
    assert " refused body-part\n" in told
    assert "PACS  " in told


def test_without_a_running_node_status_says_so(tmp_path: Path, node: NodeProcess) -> None:
    node.start()
    assert chexnet("node", "status", node.folder / "node.toml").returncode == 0
    node.kill()
    done = chexnet("node", "status", node.folder / "node.toml")
    assert (done.returncode, done.stdout) == (2, "")
    assert "no running node" in done.stderr
