"""Ed25519 keys (RFC 8032): make, read, sign, verify. The only module that imports `cryptography`.

A private key is a PEM file (PKCS#8) that nobody else may read, as `openssl genpkey -algorithm ed25519` writes it too.
"""

import os
from pathlib import Path

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from chexnet_deploy.bundle.signing.signatures import Signature, message_to_sign
from chexnet_deploy.errors import TrustError
from chexnet_deploy.files import PlainFile, sha256_hex

MAX_KEY_BYTES = 16384
_ENCRYPTED = b"-----BEGIN ENCRYPTED PRIVATE KEY-----"


def make_private_key(path: Path, passphrase: bytes | None) -> Ed25519PrivateKey:
    """Make a key and write it to a new file of mode 600.

    Args:
        path: where; nothing may be there yet.
        passphrase: encrypts the file; None leaves it in the clear.

    Raises:
        TrustError: something is there already, or it can't be written.
    """
    key = Ed25519PrivateKey.generate()
    encryption: serialization.KeySerializationEncryption = serialization.NoEncryption()
    if passphrase is not None:
        encryption = serialization.BestAvailableEncryption(passphrase)
    pem = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encryption)
    try:
        # O_EXCL: a key that is there is worth more than this one.
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError as err:
        raise TrustError(f"{path} is there already. Choose another file; keys are not overwritten.") from err
    except OSError as err:
        raise TrustError(f"{path} can't be written: {err.strerror}. Choose another place.") from err
    with os.fdopen(handle, "wb") as file:
        file.write(pem)
        file.flush()
        os.fsync(file.fileno())
    return key


def read_key_file(path: Path) -> bytes:
    """Return a private key's file.

    Raises:
        TrustError: it is missing, or its mode lets others read it.
    """
    return PlainFile(
        path=path,
        limit_bytes=MAX_KEY_BYTES,
        error=TrustError,
        next_step="Make one: chexnet-deploy keygen KEY.pem",
        follows_links=True,
        refused_mode=0o077,
    ).read()


def is_encrypted(pem: bytes) -> bool:
    """Say whether a key file needs a passphrase."""
    return _ENCRYPTED in pem


def load_private_key(pem: bytes, passphrase: bytes | None, where: str) -> Ed25519PrivateKey:
    """Return the key in a PEM file.

    Args:
        pem: from read_key_file.
        passphrase: where it is encrypted.
        where: the file, for errors.

    Raises:
        TrustError: no PEM of PKCS#8, another passphrase, or another kind of key.
    """
    try:
        key = serialization.load_pem_private_key(pem, passphrase)
    except (ValueError, TypeError, UnsupportedAlgorithm) as err:
        # Without the library's own words: they might hold a part of the key.
        raise TrustError(
            f"{where} holds no private key that opens with this passphrase; needed Ed25519 as PKCS#8 PEM. "
            f"Make one: chexnet-deploy keygen KEY.pem"
        ) from err
    if not isinstance(key, Ed25519PrivateKey):
        raise TrustError(f"{where} holds {type(key).__name__}, needed Ed25519. Run: chexnet-deploy keygen KEY.pem")
    return key


def sign_content(key: Ed25519PrivateKey, content: bytes, payload_type: bytes) -> Signature:
    """Sign the bytes of a file of that type. Ed25519 takes no random numbers: the same key gives the same signature again."""
    return Signature(key=fingerprint(public_der(key)), ed25519=key.sign(message_to_sign(content, payload_type)).hex())


def verify_content(public_raw: bytes, signature: Signature, content: bytes, payload_type: bytes) -> bool:
    """Say whether a signature is this key's for these bytes.

    Args:
        public_raw: the public key's 32 bytes.
        signature: whose fingerprint has been matched already.
        content: the bytes of the file.
        payload_type: what the file is.
    """
    try:
        Ed25519PublicKey.from_public_bytes(public_raw).verify(
            bytes.fromhex(signature.ed25519), message_to_sign(content, payload_type)
        )
    except InvalidSignature:
        return False
    return True


def public_der(key: Ed25519PrivateKey) -> bytes:
    """Return a key's public half as SubjectPublicKeyInfo (RFC 8410), 44 bytes."""
    return key.public_key().public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)


def fingerprint(der: bytes) -> str:
    """Return the SHA-256 of a public key's SubjectPublicKeyInfo: `openssl pkey -pubout -outform DER | sha256sum`."""
    return sha256_hex(der)
