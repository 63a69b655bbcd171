"""The command line: a node's unit, and its audit log."""

import json
from pathlib import Path

from chexnet_deploy.bundle.bundle import Bundle
from chexnet_deploy.dicom.node.audit import AuditLog
from chexnet_deploy.dicom.node.storage_scp import TRANSFER_SYNTAXES
from chexnet_deploy.images.dicom import header
from tests.cli.test_cli import chexnet
from tests.dicom.node.test_config import WHOLE


def test_the_syntaxes_offered_are_those_the_decoder_reads() -> None:
    assert set(TRANSFER_SYNTAXES) == header.TRANSFER_SYNTAXES


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
