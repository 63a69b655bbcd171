"""TLS on both sides of a node, with DCMTK's programs as peers."""

import socket
import ssl
import subprocess
import time
from collections.abc import Iterator
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import rsa

from benchmarks.rigs.node_rig import NODE, PACS, SCANNER, NodeProcess, free_port, wait_for_port, write_radiograph
from chexnet_deploy.bundle.bundle import Bundle
from chexnet_deploy.dicom.node.config import Tls
from chexnet_deploy.dicom.node.tls import open_context
from chexnet_deploy.errors import NodeError
from tests.dicom.node.conftest import dcmtk
from tests.dicom.node.test_guard import Front
from tests.dicom.node.test_service import audited, is_delivered, wait_until


def make_certificate(folder: Path, name: str) -> Tls:
    """Write a self-signed certificate and its key; its own authority."""
    key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
    now = datetime.now(timezone.utc)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    made = Tls(certificate=folder / f"{name}.pem", key=folder / f"{name}.key", authorities=folder / f"{name}.pem")
    made.certificate.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    encoding, form = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    made.key.write_bytes(key.private_bytes(encoding, form, serialization.NoEncryption()))
    made.key.chmod(0o600)
    return made


@pytest.fixture(scope="module")
def parties(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tls]:
    """The node believes scanner and PACS, they believe the node, and nobody the stranger."""
    folder = tmp_path_factory.mktemp("tls")
    made = {name: make_certificate(folder, name) for name in ("node", "scanner", "pacs", "stranger")}
    believed = folder / "believed.pem"
    believed.write_bytes(made["scanner"].certificate.read_bytes() + made["pacs"].certificate.read_bytes())
    made["node"] = made["node"].model_copy(update={"authorities": believed})
    return made


@pytest.fixture
def front(parties: dict[str, Tls], tmp_path: Path) -> Iterator[Front]:
    made = Front(tmp_path / "state", tls=open_context(parties["node"], is_server=True))
    yield made
    made.guard.stop()


def storescu_tls(port: int, own: Tls, node: Tls, *files: Path) -> subprocess.CompletedProcess[str]:
    titles = ["-aet", SCANNER, "-aec", NODE, "127.0.0.1", str(port)]
    tls = ["+tls", str(own.key), str(own.certificate), "+cf", str(node.certificate), "+py"]
    command = [dcmtk("storescu"), "-v", *tls, *titles, *map(str, files)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def test_dcmtk_stores_by_tls_and_the_destination_gets_results_by_tls(
    bundles: dict[str, Bundle], parties: dict[str, Tls], tmp_path: Path
) -> None:
    storescp = dcmtk("storescp")
    own = parties["node"]
    port = free_port()
    settings = f'[tls]\ncertificate = "{own.certificate}"\nkey = "{own.key}"\nauthorities = "{own.authorities}"\n'
    node = NodeProcess(
        tmp_path / "node",
        bundles["fp32"].path,
        listen_settings="tls = true",
        pacs_settings="tls = true",
        pacs_port=port,
    )
    node.overrides = settings
    (tmp_path / "pacs").mkdir()
    tls = ["+tls", str(parties["pacs"].key), str(parties["pacs"].certificate), "+cf", str(own.certificate)]
    command = [storescp, *tls, "--aetitle", PACS, "--output-directory", str(tmp_path / "pacs"), str(port)]
    pacs = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_for_port(port)
        node.start()
        images = [tmp_path / f"{i}.dcm" for i in range(3)]
        for i, path in enumerate(images):
            write_radiograph(path, seed=i)
        done = storescu_tls(node.port, parties["scanner"], own, *images)
        assert done.returncode == 0, done.stderr
        wait_until(lambda: is_delivered(node, 3), timeout_s=60.0)
        wait_until(lambda: len(list((tmp_path / "pacs").iterdir())) == len(audited(node, "delivered")))
        plain = subprocess.run(
            [dcmtk("storescu"), "-aet", SCANNER, "-aec", NODE, "127.0.0.1", str(node.port), str(images[0])], timeout=60
        )
        assert plain.returncode != 0
        ends = [event for event in node.events() if event["event"] == "connection-ended"]
        assert [end["reason"] for end in ends][:1] == ["released"]
        assert ends[-1]["reason"] == "tls"
    finally:
        pacs.kill()
        pacs.wait()
        node.kill()


@pytest.mark.parametrize("size_px", [96, 800, 2000])
def test_images_of_every_size_go_through(front: Front, parties: dict[str, Tls], tmp_path: Path, size_px: int) -> None:
    path = tmp_path / "a.dcm"
    image = write_radiograph(path, seed=1, side_px=size_px)
    done = storescu_tls(front.port, parties["scanner"], parties["node"], path)
    assert done.returncode == 0, done.stderr
    (stored,) = (front.spool.folder / "received").iterdir()
    assert image.PixelData in stored.read_bytes()
    front.wait_for_end("released")


def test_a_stranger_s_certificate_is_refused(front: Front, parties: dict[str, Tls], tmp_path: Path) -> None:
    write_radiograph(tmp_path / "a.dcm", seed=1)
    done = storescu_tls(front.port, parties["stranger"], parties["node"], tmp_path / "a.dcm")
    assert done.returncode != 0
    assert front.wait_for_end("tls").detail == "certificate-verify-failed"
    assert front.kept == []


@pytest.mark.filterwarnings("ignore:ssl.TLSVersion:DeprecationWarning")
@pytest.mark.parametrize("kind", ["no certificate", "tls 1.1", "weak cipher"])
def test_less_than_the_profile_is_refused(front: Front, parties: dict[str, Tls], kind: str) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    if kind != "no certificate":
        context.load_cert_chain(parties["scanner"].certificate, parties["scanner"].key)
    if kind == "tls 1.1":
        context.set_ciphers("ALL:@SECLEVEL=0")
        context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_1
    if kind == "weak cipher":
        context.set_ciphers("AES128-SHA:@SECLEVEL=0")  # no forward secrecy
    with socket.create_connection(("127.0.0.1", front.port), 5.0) as plain, pytest.raises((ssl.SSLError, OSError)):
        context.wrap_socket(plain).recv(1)
    front.wait_for_end("tls")


@pytest.mark.parametrize("sent", [b"", b"\x16\x03\x01", b"\x16\x03\x01\x02\x00\x01"])
def test_a_handshake_that_does_not_end_is_not_waited_for(front: Front, sent: bytes) -> None:
    with socket.create_connection(("127.0.0.1", front.port), 5.0) as connection:
        connection.sendall(sent)
        start_s = time.monotonic()
        assert connection.recv(1) == b""  # 1 s is the time to ask for an association
        assert 0.8 < time.monotonic() - start_s < 2.5
    front.wait_for_end("timed-out")


def test_silent_handshakes_keep_nobody_out(front: Front, parties: dict[str, Tls], tmp_path: Path) -> None:
    write_radiograph(tmp_path / "a.dcm", seed=1)
    silent = [socket.create_connection(("127.0.0.1", front.port), 5.0) for _ in range(100)]
    try:
        assert storescu_tls(front.port, parties["scanner"], parties["node"], tmp_path / "a.dcm").returncode == 0
    finally:
        for connection in silent:
            connection.close()


def test_a_key_that_others_may_read_is_refused(parties: dict[str, Tls]) -> None:
    parties["scanner"].key.chmod(0o644)
    try:
        with pytest.raises(NodeError, match="chmod go-rwx"):
            open_context(parties["scanner"], is_server=True)
    finally:
        parties["scanner"].key.chmod(0o600)


@pytest.mark.parametrize("name", ["certificate", "key", "authorities"])
def test_a_file_that_is_none_of_tls_is_refused(parties: dict[str, Tls], tmp_path: Path, name: str) -> None:
    wrong = tmp_path / "wrong.pem"
    wrong.write_text("nothing")
    wrong.chmod(0o600)
    for path in (wrong, tmp_path / "absent.pem"):
        with pytest.raises(NodeError):
            open_context(parties["node"].model_copy(update={name: path}), is_server=True)
