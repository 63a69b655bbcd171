"""The command line: a node's unit, and its audit log."""

import json
import re
from pathlib import Path

import pytest
from pydicom.uid import UID

from chexnet_deploy.bundle.bundle import Bundle
from chexnet_deploy.dicom.node.audit import AuditLog
from chexnet_deploy.dicom.node.config import Limits
from chexnet_deploy.dicom.node.inbox import DROPPED_SOP_CLASSES, STATUSES, Pseudonyms
from chexnet_deploy.dicom.node.storage_scp import SOP_CLASSES, TRANSFER_SYNTAXES
from chexnet_deploy.images.dicom.codestreams import JPEG_2000, JPEG_BASELINE, JPEG_LOSSLESS, JPEG_LS, RLE
from chexnet_deploy.images.dicom.header import UNCOMPRESSED
from tests.cli.test_cli import chexnet
from tests.dicom.node.test_config import WHOLE


def test_the_page_names_every_status_syntax_and_limit() -> None:
    page = (Path(__file__).parents[3] / "docs" / "dicom-node.md").read_text()
    told = {int(status, 16) for status in re.findall(r"0x([0-9A-F]{4})", page)}
    assert told == set(STATUSES.values())
    for limit, value in Limits().model_dump().items():
        assert f"{value:g}" in page, limit
    for uid in SOP_CLASSES:
        assert UID(uid).name in page, uid


def test_everything_that_is_dropped_is_a_storage_class_beside_those_answered() -> None:
    assert len(set(DROPPED_SOP_CLASSES)) == len(DROPPED_SOP_CLASSES)
    assert not set(DROPPED_SOP_CLASSES) & set(SOP_CLASSES)
    names = " ".join(uid.name for uid in DROPPED_SOP_CLASSES)
    for word in (
        "Comprehensive 3D SR",
        "Key Object",
        "Grayscale Softcopy",
        "Encapsulated PDF",
        "Multi-frame True Color",
    ):
        assert word in names
    for word in ("CT Image", "MR Image", "Mammography X-Ray", "Ultrasound"):
        assert word not in names


@pytest.mark.parametrize("words", [("node",), ("node", "run")])
def test_a_node_is_run_with_and_without_the_word(tmp_path: Path, words: tuple[str, ...]) -> None:
    for rest in ((), ("--print-unit",)):
        done = chexnet(*words, tmp_path / "absent.toml", *rest)
        assert (done.returncode, done.stdout) == (2, "")
        assert "absent.toml can't be read" in done.stderr


@pytest.mark.parametrize("name", ["node.key", "audit.jsonl"])
def test_finding_an_image_needs_log_and_key(tmp_path: Path, name: str) -> None:
    AuditLog.open(tmp_path / "audit.jsonl").close()
    Pseudonyms.open(tmp_path)
    assert chexnet("audit", "find", tmp_path / "audit.jsonl", "--uid", "1.2.3").stdout == "nothing\n"
    (tmp_path / name).unlink()
    done = chexnet("audit", "find", tmp_path / "audit.jsonl", "--uid", "1.2.3")
    assert (done.returncode, done.stdout) == (2, "")
    assert f"{name} can't be read" in done.stderr
    assert not (tmp_path / name).exists()


def test_the_syntaxes_offered_are_those_the_decoder_reads() -> None:
    assert set(TRANSFER_SYNTAXES) == UNCOMPRESSED | {JPEG_BASELINE, RLE} | JPEG_LOSSLESS | JPEG_LS | JPEG_2000


def test_audit_verify_prints_the_head_and_refuses_a_cut_log(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    log = AuditLog.open(path)
    for _ in range(3):
        log.append("received")
    log.close()
    assert chexnet("audit", "verify", path).stdout.split() == [str(path), "3", "lines", "head", log.head.hash]
    assert json.loads(chexnet("audit", "verify", path, "--json").stdout) == {"lines": 3, "head": log.head.hash}
    assert chexnet("audit", "verify", path, "--head", log.head.hash).returncode == 0
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:2]))
    for words in ((), ("--head", log.head.hash)):
        cut = chexnet("audit", "verify", path, *words)
        assert (cut.returncode, cut.stdout) == (2, "")
        assert "Lines were cut off" in cut.stderr


def test_wrong_configuration_is_one_line_and_exit_2(tmp_path: Path) -> None:
    path = tmp_path / "node.toml"
    path.write_text(WHOLE.replace("port = 104", "port = 0"))
    path.chmod(0o600)
    done = chexnet("node", path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"error: {path}: destinations.0.port")
    assert done.stderr.count("\n") == 1


def test_unit_of_a_configuration_in_a_temporary_folder_is_refused(tmp_path: Path, bundles: dict[str, Bundle]) -> None:
    path = tmp_path / "node.toml"
    path.write_text(WHOLE.replace("/opt/chexnet/bundle", str(bundles["fp32"].path)))
    path.chmod(0o600)
    done = chexnet("node", path, "--print-unit")
    assert done.returncode == 2
    assert "temporary folder" in done.stderr
