"""manifest.sig and attestation.sig: who signed the file beside, in the one form that is accepted. Knows no keys; see keys.py.

A signature is Ed25519 (RFC 8032) over the pre-authentication encoding of DSSE 1.0 (secure-systems-lab/dsse, protocol.md),
a standard's way of saying what is signed, so that no signature made for anything else fits here:

    DSSEv1 <bytes of the type> <type> <bytes of the file> <the file>
"""

import json
from abc import abstractmethod
from typing import TYPE_CHECKING, Annotated, ClassVar

from pydantic import Field, StringConstraints, ValidationError

from chexnet_deploy.errors import TrustError
from chexnet_deploy.files import FirstFormat, Sha256
from chexnet_deploy.inputs import StrictRecord, describe

if TYPE_CHECKING:
    from typing_extensions import Self

SIGNATURE = "manifest.sig"
MANIFEST_TYPE = b"application/vnd.chexnet-deploy.manifest.v1+json"
SITE_TYPE = b"application/vnd.chexnet-deploy.site.v1+json"
ATTESTATION_TYPE = b"application/vnd.chexnet-deploy.attestation.v1+json"
MAX_SIGNATURES = 8  # a key and its successor are two; more is for several parties
MAX_SIGNATURE_BYTES = 4096

Ed25519Hex = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{128}$")]
"""64 bytes as lower-case hexadecimal digits."""


class Signature(StrictRecord):
    """A signature over one file by one key.

    Attributes:
        key: the key's fingerprint, see keys.fingerprint.
        ed25519: the signature.
    """

    key: Sha256
    ed25519: Ed25519Hex


class WrittenRecord(StrictRecord):
    """A file that has one form: only the bytes that to_bytes writes are accepted, so none of them is without meaning.

    Attributes:
        writer: the command that writes it.
        again: what to do with another form.
    """

    writer: ClassVar[str]
    again: ClassVar[str]

    @classmethod
    def parse(cls, content: bytes, where: str) -> "Self":
        """Read such a file.

        Args:
            content: of a bounded size.
            where: the file, for errors.

        Raises:
            TrustError: any other form.
        """
        try:
            parsed = cls.model_validate_json(content)
        except ValidationError as err:
            raise TrustError(f"{where}: {describe(err)}. {cls.again}") from err
        if parsed.to_bytes() != content:
            raise TrustError(f"{where} is not in the form that `{cls.writer}` writes. {cls.again}")
        return parsed

    @abstractmethod
    def to_bytes(self) -> bytes:
        """Return the bytes of the file."""


class SignatureFile(WrittenRecord):
    """All signatures of one file; more than one while a fleet changes from a key to its successor."""

    writer = "sign"
    again = "Copy the bundle again, or delete it and sign again."

    format: FirstFormat = 1
    signatures: Annotated[tuple[Signature, ...], Field(min_length=1, max_length=MAX_SIGNATURES)]

    @classmethod
    def of(cls, signatures: tuple[Signature, ...]) -> "SignatureFile":
        """Return the file of some signatures; of two by one key the last is kept.

        Raises:
            TrustError: more than MAX_SIGNATURES.
        """
        by_key = {signature.key: signature for signature in signatures}
        if len(by_key) > MAX_SIGNATURES:
            raise TrustError(
                f"{len(by_key)} keys would have signed, at most {MAX_SIGNATURES} may. "
                f"Delete {SIGNATURE} and sign with those that are still trusted."
            )
        return cls(signatures=tuple(by_key[key] for key in sorted(by_key)))

    def to_bytes(self) -> bytes:
        """Return the bytes of the file, the signatures in the order of their keys."""
        return (json.dumps(self.of(self.signatures).model_dump(mode="json"), indent=2) + "\n").encode()


def message_to_sign(content: bytes, payload_type: bytes) -> bytes:
    """Return what is signed for the bytes of a file of that type."""
    return b"DSSEv1 %d %b %d %b" % (len(payload_type), payload_type, len(content), content)
