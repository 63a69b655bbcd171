"""Sign a bundle, and admit the first release to a machine: what is done to bundles with keys and floors.

Imports `cryptography`, so it is imported lazily, by the commands that need it.
"""

from dataclasses import dataclass
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from chexnet_deploy.bundle.bundle import Bundle
from chexnet_deploy.bundle.signing.keys import fingerprint, public_der, sign_manifest, verify_manifest
from chexnet_deploy.bundle.signing.releases import start_floor
from chexnet_deploy.bundle.signing.signatures import (
    MAX_SIGNATURE_BYTES,
    PAYLOAD_TYPE,
    SIGNATURE,
    Signature,
    SignatureFile,
)
from chexnet_deploy.bundle.signing.trust import Trust
from chexnet_deploy.bundle.site import SITE_PAYLOAD_TYPE, SITE_SUFFIX, signature_path, site_path
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


def sign_bundle(path: Path, key: Ed25519PrivateKey) -> SignedBundle:
    """Add a key's signature to a bundle's manifest.sig; signatures by other keys stay.

    Raises:
        BundleError: the bundle is damaged: nobody should vouch for it.
        TrustError: manifest.sig is damaged, full, or can't be written.
    """
    bundle = Bundle.open(path)
    folder = path.resolve()
    # The unfinished file lies beside the bundle: in it, whoever opens the bundle meanwhile would refuse it.
    n = _add_signature(folder / SIGNATURE, key, bundle.read_manifest_bytes(), PAYLOAD_TYPE, partial_in=folder.parent)
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
    n = _add_signature(signature_path(path.resolve()), key, site.to_json(), SITE_PAYLOAD_TYPE)
    return SignedBundle(bundle, site.id, fingerprint(public_der(key)), n)


def _add_signature(
    file: Path, key: Ed25519PrivateKey, content: bytes, payload_type: bytes, *, partial_in: Path | None = None
) -> int:
    """Sign some bytes and write the signature beside others in a file; return how many there are now."""
    signature = sign_manifest(key, content, payload_type)
    # A fault while a key is used can give a signature that betrays it (Boneh, DeMillo & Lipton 1997): none is let out unverified.
    if not verify_manifest(public_der(key)[-32:], signature, content, payload_type):
        raise TrustError(f"{file}: the signature just made is wrong. This machine can't be trusted with a key.")
    signed = SignatureFile.of((*_signatures_in(file), signature))
    try:
        write_file(file, signed.to_bytes(), partial_in=partial_in)
    except OSError as err:
        raise TrustError(f"{file} can't be written: {err.strerror}. Check the disk and its permissions.") from err
    return len(signed.signatures)


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
    content = PlainFile(
        path=file, limit_bytes=MAX_SIGNATURE_BYTES, error=TrustError, next_step="Delete it and sign again."
    ).read()
    return SignatureFile.parse(content, str(file)).signatures
