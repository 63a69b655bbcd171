"""A node whose configuration names a trust file runs what is signed, and nothing else."""

import base64
import shutil
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from benchmarks.rigs.node_rig import NodeProcess
from chexnet_deploy.bundle.bundle import Bundle
from chexnet_deploy.bundle.signing.keys import public_der
from chexnet_deploy.bundle.signing.releases import Release, start_floor
from chexnet_deploy.bundle.signing.sign import sign_bundle
from chexnet_deploy.dicom.node.service import print_unit
from chexnet_deploy.errors import NodeError
from tests.dicom.node.test_config import WHOLE, write


def write_trust(path: Path, key: Ed25519PrivateKey, *, more: str = "") -> Path:
    public = base64.b64encode(public_der(key)).decode()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'format = 1\n{more}\n[[keys]]\nname = "release"\npublic_key = "{public}"\n')
    path.chmod(0o644)
    return path


@pytest.fixture
def key() -> Ed25519PrivateKey:
    return Ed25519PrivateKey.from_private_bytes(bytes(range(32)))


@pytest.fixture
def trusting(node: NodeProcess, key: Ed25519PrivateKey, tmp_path: Path) -> NodeProcess:
    """A node, not started, with a copy of its bundle that nobody signed yet."""
    trust = write_trust(tmp_path / "trust.toml", key)
    node.bundle = shutil.copytree(node.bundle, tmp_path / "copy")
    node.model_settings = f'trust = "{trust}"'
    return node


def test_unsigned_bundle_never_answers(trusting: NodeProcess) -> None:
    with pytest.raises(RuntimeError, match="worker-failed-TrustError"):
        trusting.start()
    assert trusting.process is not None
    assert trusting.process.wait(10.0) == 70


def test_signed_bundle_answers(trusting: NodeProcess, key: Ed25519PrivateKey) -> None:
    sign_bundle(trusting.bundle, key)
    trusting.start()
    assert trusting.stop() == 0


def test_unit_refuses_a_floor_that_the_service_cannot_raise(
    bundles: dict[str, Bundle], key: Ed25519PrivateKey, tmp_path: Path
) -> None:
    release, unreleased = Release(line="adult", number=1), bundles["fp32"]
    manifest = unreleased.manifest.model_copy(update={"release": release})
    bundle = Bundle.write(tmp_path / "bundle", manifest, unreleased.read_model(), unreleased.read_probe_bytes())
    sign_bundle(bundle.path, key)
    start_floor(tmp_path / "floor.json", release)
    trust = write_trust(tmp_path / "trust.toml", key, more='line = "adult"\nfloor_file = "floor.json"')
    config = write(tmp_path, WHOLE.replace('"/opt/chexnet/bundle"', f'"{bundle.path}"\ntrust = "{trust}"'))
    with pytest.raises(NodeError, match=r"floor\.json must be written whenever a newer release has run"):
        print_unit(config, Path("/opt/chexnet/bin/chexnet-deploy"))
