"""Site files: bound to a bundle, refused when edited, swapped or unsigned; and what they decide."""

import base64
import hashlib
import json
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from chexnet_deploy.bundle.bundle import Bundle
from chexnet_deploy.bundle.manifest import ONNX_MODEL, PROBE
from chexnet_deploy.bundle.signing.keys import public_der, sign_content
from chexnet_deploy.bundle.signing.sign import sign_bundle, sign_site
from chexnet_deploy.bundle.signing.signatures import MANIFEST_TYPE, SignatureFile
from chexnet_deploy.bundle.signing.trust import Trust, TrustedKey
from chexnet_deploy.bundle.site import Evidence, OperatingPoints, Site, SitePoint, signature_path, site_path
from chexnet_deploy.errors import BundleError, ChexnetError, TrustError
from tests.command_line import assert_one_line_error, chexnet
from tests.tiny import tiny_manifest

FILES = {ONNX_MODEL: b"m" * 5000, PROBE: b"p" * 1000}
FINDINGS = ("Mass", "Nodule", "Hernia")


def write_tiny(path: Path, **changes: object) -> Bundle:
    manifest = tiny_manifest(
        FILES, findings=FINDINGS, head_bias=(0.0,) * 3, operating_points=dict.fromkeys(FINDINGS, 0.5), **changes
    )
    return Bundle.write(path, manifest, FILES[ONNX_MODEL], FILES[PROBE])


def point(present_at: float | None, absent_below: float | None) -> SitePoint:
    return SitePoint(
        present_at=present_at,
        absent_below=absent_below,
        guaranteed={"ppv": Evidence(n_patients=100, n_wrong=3)},
        not_guaranteed={"npv": "too few"},
        sensitivity=0.9,
        specificity=None,
        undetermined=0.1,
    )


def site_for(bundle_id: str, **points: SitePoint) -> Site:
    return Site(
        bundle=bundle_id,
        asked={"ppv": 0.9, "npv": 0.95},
        confidence=0.95,
        points=points or {"Mass": point(0.7, 0.2)},
        without={"Hernia": "too few"},
        data="100 images",
        patients_note=(),
        n_images=100,
        n_patients=100,
        n_refused=0,
        inputs_sha256={},
        backend="cpu",
        made_utc="2026-01-01T00:00:00+00:00",
        tools={},
    )


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return write_tiny(tmp_path / "bundle")


@pytest.fixture
def site(bundle: Bundle) -> Path:
    path = site_path(bundle.path)
    path.write_bytes(site_for(bundle.id).to_json())
    return path


@pytest.fixture(scope="module")
def keys() -> dict[str, Ed25519PrivateKey]:
    roles = ("release", "stranger")
    return {role: Ed25519PrivateKey.from_private_bytes(hashlib.sha256(role.encode()).digest()) for role in roles}


@pytest.fixture
def trust(keys: dict[str, Ed25519PrivateKey]) -> Trust:
    public = base64.b64encode(public_der(keys["release"])).decode()
    return Trust(keys=(TrustedKey(name="release", public_key=public),))


def refused(bundle: Bundle, *words: str, trust: Trust | None = None, error: type[ChexnetError] = BundleError) -> None:
    with pytest.raises(error) as caught:
        Bundle.open(bundle.path, trust=trust).read_site()
    for word in words:
        assert word in str(caught.value)


def test_it_lies_beside_its_bundle_and_changes_nothing_in_it(bundle: Bundle, site: Path, tmp_path: Path) -> None:
    assert site == tmp_path / "bundle.site.json"
    found = Bundle.open(bundle.path).read_site()
    assert found == site_for(bundle.id)
    assert found is not None
    assert json.loads(site.read_bytes())["sha256"] == found.id
    assert found.in_words == f"site {found.id[:12]}: PPV at least 0.9 and NPV at least 0.95 with confidence 0.95"
    link = tmp_path / "link"
    link.symlink_to(bundle.path)
    assert Bundle.open(link).read_site() == found
    site.unlink()
    assert Bundle.open(bundle.path).read_site() is None


def test_one_of_another_bundle_is_refused(bundle: Bundle, site: Path, tmp_path: Path) -> None:
    other = write_tiny(tmp_path / "other", tools={"a": "1"})
    site_path(other.path).write_bytes(site.read_bytes())
    refused(other, bundle.id[:12], other.id[:12], "Calibrate again")


def test_every_edit_is_refused(bundle: Bundle, site: Path) -> None:
    raw = site.read_bytes()
    for place in range(0, len(raw), 7):
        site.write_bytes(raw[:place] + bytes([raw[place] ^ 1]) + raw[place + 1 :])
        with pytest.raises(BundleError):
            bundle.read_site()
    for edited in (
        raw + b"\n",
        raw[:-2],
        b"",
        b"{}",
        raw.replace(b'"confidence": 0.95', b'"confidence": 0.95,\n    "confidence": 0.95'),
        raw.replace(b"0.7", b"0.70"),
    ):
        site.write_bytes(edited)
        refused(bundle, str(site))
    site.unlink()
    site.symlink_to("/nowhere")
    refused(bundle, "plain file")


def test_one_resealed_with_an_unknown_finding_is_refused(bundle: Bundle, site: Path) -> None:
    site.write_bytes(site_for(bundle.id, Cardiomegaly=point(0.5, 0.5)).to_json())
    refused(bundle, "Cardiomegaly")


def test_trust_asks_for_its_signature_too(
    bundle: Bundle, site: Path, trust: Trust, keys: dict[str, Ed25519PrivateKey]
) -> None:
    sign_bundle(bundle.path, keys["release"])
    refused(bundle, "not signed", trust=trust, error=TrustError)
    sign_site(site, keys["stranger"])
    refused(bundle, "unknown", trust=trust, error=TrustError)
    assert sign_site(site, keys["release"]).n_signatures == 2
    assert Bundle.open(bundle.path, trust=trust).read_site() == site_for(bundle.id)
    # Resealed: whole, and by nobody.
    site.write_bytes(site_for(bundle.id, Mass=point(0.1, 0.1)).to_json())
    refused(bundle, "not for this site", trust=trust, error=TrustError)
    # A signature of a manifest is none of a site file, though the same key made it over the same bytes.
    as_manifest = sign_content(keys["release"], site.read_bytes(), MANIFEST_TYPE)
    signature_path(site).write_bytes(SignatureFile.of((as_manifest,)).to_bytes())
    refused(bundle, "not for this", trust=trust, error=TrustError)


def test_sign_and_verify_take_site_files(bundle: Bundle, site: Path, tmp_path: Path) -> None:
    key, trust = tmp_path / "key.pem", tmp_path / "trust.toml"
    trust.write_text(chexnet("keygen", key).stdout)
    assert chexnet("sign", bundle.path, "--key", key).returncode == 0
    assert_one_line_error(chexnet("verify", bundle.path, "--trust", trust), 2, "bundle.site.json is not signed")
    done = chexnet("sign", site, "--key", key)
    assert done.returncode == 0
    assert site_for(bundle.id).id[:12] in done.stdout
    assert chexnet("verify", bundle.path, "--trust", trust).returncode == 0
    assert json.loads(chexnet("inspect", bundle.path).stdout)["site"]["points"]["Mass"]["present_at"] == 0.7
    site.write_bytes(site.read_bytes().replace(b"0.7", b"0.8"))
    assert_one_line_error(chexnet("sign", site, "--key", key), 2, "was changed")


def test_two_thresholds_leave_out_what_lies_between() -> None:
    manifest = tiny_manifest(FILES, findings=FINDINGS, head_bias=(0.0,) * 3, operating_points={"Hernia": 0.5})
    site = site_for("0" * 64, Mass=point(0.7, 0.2), Nodule=point(None, 0.2))
    points = OperatingPoints.of(manifest, site)
    assert points.decide({"Mass": 0.7, "Nodule": 0.9, "Hernia": 0.9}) == {"Mass": True}
    assert points.decide({"Mass": 0.2, "Nodule": 0.1, "Hernia": 0.1}) == {"Nodule": False}
    assert points.decide({"Mass": 0.19, "Nodule": 0.2, "Hernia": 0.1}) == {"Mass": False}
    assert points.place("Mass", 0.5) == "undetermined between 0.2000 and 0.7000"
    assert points.place("Nodule", 0.5) == "undetermined from 0.2000 on"
    assert points.place("Hernia", 0.5) == "no operating point"  # the bundle's own counts no more
    assert points.findings == {"Mass", "Nodule"}
    own = OperatingPoints.of(manifest, None)
    assert own.decide({"Mass": 0.7, "Hernia": 0.5}) == {"Hernia": True}
    assert own.place("Hernia", 0.4) == "below the operating point 0.5000"
