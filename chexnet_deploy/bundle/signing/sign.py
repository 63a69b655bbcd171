"""Sign a bundle, and admit the first release to a machine: what is done to bundles with keys and floors.

Imports `cryptography`, so it is imported lazily, by the commands that need it.
"""

from dataclasses import dataclass
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from chexnet_deploy.bundle.bundle import Bundle
from chexnet_deploy.bundle.signing.keys import fingerprint, public_der, sign_manifest, verify_manifest
from chexnet_deploy.bundle.signing.releases import start_floor
from chexnet_deploy.bundle.signing.signatures import MAX_SIGNATURE_BYTES, SIGNATURE, Signature, SignatureFile
from chexnet_deploy.bundle.signing.trust import Trust
from chexnet_deploy.errors import TrustError
from chexnet_deploy.files import PlainFile, write_file


@dataclass(frozen=True, slots=True)
class SignedBundle:
    """A bundle that was just signed.

    Attributes:
        bundle: opened before it was signed; signing changes nothing in it.
        key: the signing key's fingerprint.
        n_signatures: by how many keys it is signed now.
    """

    bundle: Bundle
    key: str
    n_signatures: int


def sign_bundle(path: Path, key: Ed25519PrivateKey) -> SignedBundle:
    """Add a key's signature to a bundle's manifest.sig; signatures by other keys stay.

    Raises:
        BundleError: the bundle is damaged: nobody should vouch for it.
        TrustError: manifest.sig is damaged, full, or can't be written.
    """
    bundle = Bundle.open(path)
    manifest = bundle.read_manifest_bytes()
    signature = sign_manifest(key, manifest)
    der = public_der(key)
    # A fault while a key is used can give a signature that betrays it (Boneh, DeMillo & Lipton 1997): none is let out unverified.
    if not verify_manifest(der[-32:], signature, manifest):
        raise TrustError(f"{path}: the signature just made is wrong. This machine can't be trusted with a key.")
    signed = SignatureFile.of((*_signatures_in(path), signature))
    folder = path.resolve()
    try:
        # The unfinished file lies beside the bundle: in it, whoever opens the bundle meanwhile would refuse it.
        write_file(folder / SIGNATURE, signed.to_bytes(), partial_in=folder.parent)
    except OSError as err:
        raise TrustError(
            f"{path / SIGNATURE} can't be written: {err.strerror}. Check the disk and its permissions."
        ) from err
    return SignedBundle(bundle, fingerprint(der), len(signed.signatures))


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


def _signatures_in(path: Path) -> tuple[Signature, ...]:
    file = path / SIGNATURE
    if not file.exists() and not file.is_symlink():
        return ()
    content = PlainFile(
        path=file, limit_bytes=MAX_SIGNATURE_BYTES, error=TrustError, next_step="Delete it and sign again."
    ).read()
    return SignatureFile.parse(content, str(file)).signatures
