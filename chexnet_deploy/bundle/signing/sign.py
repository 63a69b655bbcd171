"""Sign a bundle, and admit the first release to a machine: what is done to bundles with keys and floors.

Imports `cryptography`, so it is imported lazily, by the commands that need it.
"""

from dataclasses import dataclass
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from chexnet_deploy.bundle.bundle import Bundle
from chexnet_deploy.bundle.signing.attestation import (
    ATTESTATION,
    ATTESTATION_SIGNATURE,
    MAX_ATTESTATION_BYTES,
    Attestation,
)
from chexnet_deploy.bundle.signing.keys import fingerprint, public_der, sign_content, verify_content
from chexnet_deploy.bundle.signing.releases import start_floor
from chexnet_deploy.bundle.signing.signatures import (
    ATTESTATION_TYPE,
    MANIFEST_TYPE,
    MAX_SIGNATURE_BYTES,
    SIGNATURE,
    SITE_TYPE,
    Signature,
    SignatureFile,
)
from chexnet_deploy.bundle.signing.trust import Trust
from chexnet_deploy.bundle.site import SITE_SUFFIX, signature_path, site_path
from chexnet_deploy.errors import BundleError, TrustError
from chexnet_deploy.files import PlainFile, write_file


@dataclass(frozen=True, slots=True)
class SignedBundle:
    """A bundle, or its site file, that was just signed.

    Attributes:
        bundle: opened before it was signed; signing changes nothing in it.
        id: the bundle's, or the site file's.
        key: the signing key's fingerprint.
        n_signatures: by how many keys it is signed now.
    """

    bundle: Bundle
    id: str
    key: str
    n_signatures: int


def sign_bundle(path: Path, key: Ed25519PrivateKey, attestation: Path | None = None) -> SignedBundle:
    """Add a key's signature to a bundle's manifest.sig; signatures by other keys stay.

    Args:
        path: the bundle.
        key: signs.
        attestation: what `bench` wrote of this bundle; it is put into the bundle, and signed too. Never signed is what lies in
            the bundle already: who brought the bundle may have put it there.

    Raises:
        BundleError: the bundle is damaged: nobody should vouch for it.
        TrustError: a .sig file is damaged, full, or can't be written; or the attestation is of another bundle.
    """
    bundle = Bundle.open(path)
    if attestation is not None:
        _attest(bundle, key, attestation)
    n = _sign(bundle.path, SIGNATURE, key, bundle.read_manifest_bytes(), MANIFEST_TYPE)
    return SignedBundle(bundle, bundle.id, fingerprint(public_der(key)), n)


def sign_site(path: Path, key: Ed25519PrivateKey) -> SignedBundle:
    """Add a key's signature to a site file's; signatures by other keys stay.

    Args:
        path: BUNDLE.site.json, beside its bundle.
        key: private.

    Raises:
        BundleError: it lies beside no bundle, is for another, or one of the two is damaged.
        TrustError: its signatures are damaged, full, or can't be written.
    """
    bundle = Bundle.open(path.with_name(path.name.removesuffix(SITE_SUFFIX)))
    site = bundle.read_site()
    if site is None or site_path(bundle.path) != path.resolve():
        raise BundleError(f"{path} is not the site file of {bundle.path}. Give the one beside the bundle itself.")
    signed = signature_path(path.resolve())
    n = _sign(signed.parent, signed.name, key, site.to_json(), SITE_TYPE)
    return SignedBundle(bundle, site.id, fingerprint(public_der(key)), n)


def _attest(bundle: Bundle, key: Ed25519PrivateKey, file: Path) -> None:
    content = _file(file, MAX_ATTESTATION_BYTES, "Give the file that `bench` wrote.", follows_links=True).read()
    Attestation.parse(content, str(file)).refuse_other(bundle.id, bundle.model_sha256, str(bundle.path))
    place = bundle.path / ATTESTATION
    if not place.exists() or place.read_bytes() != content:
        # The signatures go first: cut short here, the bundle has none, and is refused.
        (bundle.path / ATTESTATION_SIGNATURE).unlink(missing_ok=True)
        _write(place, content)
    _sign(bundle.path, ATTESTATION_SIGNATURE, key, content, ATTESTATION_TYPE)


def _sign(folder: Path, name: str, key: Ed25519PrivateKey, content: bytes, payload_type: bytes) -> int:
    """Add a key's signature to a file of signatures; return how many it holds now."""
    signature = sign_content(key, content, payload_type)
    # A fault while a key is used can give a signature that betrays it (Boneh, DeMillo & Lipton 1997): none is let out unverified.
    if not verify_content(public_der(key)[-32:], signature, content, payload_type):
        raise TrustError(
            f"{folder / name}: the signature just made is wrong. This machine can't be trusted with a key."
        )
    signed = SignatureFile.of((*_signatures_in(folder / name), signature))
    _write(folder / name, signed.to_bytes())
    return len(signed.signatures)


def _write(file: Path, content: bytes) -> None:
    folder = file.parent.resolve()
    try:
        # The unfinished file lies beside the bundle: in it, whoever opens the bundle meanwhile would refuse it.
        write_file(folder / file.name, content, partial_in=folder.parent)
    except OSError as err:
        raise TrustError(f"{file} can't be written: {err.strerror}. Check the disk and its permissions.") from err


def admit_first(path: Path, trust: Trust) -> Bundle:
    """Verify a bundle and start the floor file with its release: on a machine's first installation.

    Raises:
        BundleError, TrustError: see Bundle.open; or trust has no floor file, or there is one already.
    """
    if trust.floor_file is None:
        raise TrustError("the trust file names no floor_file to start. Add floor_file, and line, to it.")
    bundle = Bundle.open(path, trust=trust.model_copy(update={"floor_file": None}))
    assert bundle.manifest.release is not None  # a trust with a floor file has a line, and so demands a release
    start_floor(trust.floor_file, bundle.manifest.release)
    return bundle


def _signatures_in(file: Path) -> tuple[Signature, ...]:
    if not file.exists() and not file.is_symlink():
        return ()
    content = _file(file, MAX_SIGNATURE_BYTES, "Delete it and sign again.").read()
    return SignatureFile.parse(content, str(file)).signatures


def _file(path: Path, limit_bytes: int, next_step: str, *, follows_links: bool = False) -> PlainFile:
    return PlainFile(
        path=path, limit_bytes=limit_bytes, error=TrustError, next_step=next_step, follows_links=follows_links
    )
