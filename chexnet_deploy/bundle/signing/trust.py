"""Trust: whose signature a bundle needs on this machine, which releases are too old, and which verdict it needs.

A trust file is TOML, laid down when the machine is set up, where those who deliver bundles can't write:

    format = 1
    line = "chexnet-adult"                 # the model line that may run; optional
    min_release = 3                        # nothing older, whatever has run here; optional, needs line
    floor_file = "release-floor.json"      # raised by each release that has run here; optional, needs line
    passing_specs = ["3f0a..."]            # specs whose PASS a bundle needs to run, each by its file's SHA-256; optional

    [[keys]]
    name = "release key 2026"
    public_key = "MCowBQYDK2VwAyEA..."     # the middle line of the PEM that `openssl pkey -pubout` writes
    is_revoked = false

A bundle opens if at least one key that isn't revoked has signed its manifest.json, and no such key's signature in it is
wrong. Signatures by other keys are left aside, so that a bundle can carry its signer's next key before machines know it.

With passing_specs it also needs an attestation: that `bench` passed this very bundle by one of these specs, signed in the same
way. It runs only on what the attestation names: the same model of GPU or CPU, backend and driver (runtime/sessions/open.py).
`bench` and `build` alone ask for none, as they come before it.

What this can't do. Who can write the trust file or the floor file decides what runs. It can't tell that a newer release is
kept back, nor see that a key is stolen until it is marked revoked here. A disk put back to an older state brings its floor
along. All bundles of one release are equal: fp32 for int8 is no rollback. Nothing expires, as clocks of scanners are wrong: a
PASS counts after a later FAIL, too.
"""

import base64
import binascii
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

from pydantic import Field, StringConstraints, ValidationError, field_validator, model_validator

from chexnet_deploy.bundle.signing.attestation import ATTESTATION, ATTESTATION_SIGNATURE, Attestation
from chexnet_deploy.bundle.signing.releases import (
    LineName,
    Release,
    ReleaseNumber,
    raise_floor,
    read_floor,
    refuse_older,
)
from chexnet_deploy.bundle.signing.signatures import (
    ATTESTATION_TYPE,
    MANIFEST_TYPE,
    SIGNATURE,
    SITE_TYPE,
    Signature,
    SignatureFile,
)
from chexnet_deploy.errors import TrustError, require
from chexnet_deploy.files import FirstFormat, PlainFile, Sha256, sha256_hex
from chexnet_deploy.inputs import StrictRecord, describe

if sys.version_info >= (3, 11):
    import tomllib
else:  # the same parser, before it moved into the standard library
    import tomli as tomllib


MAX_TRUST_BYTES = 65536
_ED25519_DER = bytes.fromhex("302a300506032b6570032100")  # RFC 8410, section 4: all that goes before the 32 bytes

KeyName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9 ._@-]{0,63}$")]


class TrustedKey(StrictRecord):
    """A public key that is known here.

    Attributes:
        name: for people.
        public_key: SubjectPublicKeyInfo (RFC 8410) in base64.
        is_revoked: its signatures count no more; it stays here so that a refusal can say why.
    """

    name: KeyName
    public_key: Annotated[str, StringConstraints(max_length=64)]
    is_revoked: bool = False

    @field_validator("public_key")
    @classmethod
    def _is_ed25519(cls, text: str) -> str:
        try:
            der = base64.b64decode(text, validate=True)
        except (binascii.Error, ValueError) as err:
            raise ValueError("no base64; needed the middle line of `openssl pkey -pubout`") from err
        if not der.startswith(_ED25519_DER) or len(der) != len(_ED25519_DER) + 32:
            raise ValueError("no Ed25519 public key; needed the middle line of `openssl pkey -pubout`")
        return text

    @property
    def raw(self) -> bytes:
        """The key's 32 bytes (RFC 8032)."""
        return base64.b64decode(self.public_key)[len(_ED25519_DER) :]

    @property
    def fingerprint(self) -> str:
        """SHA-256 of SubjectPublicKeyInfo; names the key in manifest.sig."""
        return sha256_hex(base64.b64decode(self.public_key))


class Trust(StrictRecord):
    """What a bundle must show to be opened here.

    Attributes:
        keys: known keys, at least one of them not revoked.
        line: the model line that may run; None for any.
        min_release: the oldest release that may run.
        floor_file: remembers the newest release that has run; must exist, see releases.start_floor.
        passing_specs: SHA-256 of the spec files whose PASS counts; None asks for no PASS.
    """

    format: FirstFormat = 1
    keys: Annotated[tuple[TrustedKey, ...], Field(min_length=1, max_length=64)]
    line: LineName | None = None
    min_release: ReleaseNumber | None = None
    floor_file: Path | None = None
    passing_specs: Annotated[tuple[Sha256, ...], Field(min_length=1, max_length=64)] | None = None

    @model_validator(mode="after")
    def _is_consistent(self) -> "Trust":
        if len({key.raw for key in self.keys}) != len(self.keys):
            raise ValueError("a key is listed twice")
        if all(key.is_revoked for key in self.keys):
            raise ValueError("every key is revoked, so nothing can be trusted")
        if self.line is None and (self.min_release is not None or self.floor_file is not None):
            raise ValueError("min_release and floor_file count the releases of one line, and no line is given")
        return self

    @classmethod
    def read(cls, path: Path | str) -> "Trust":
        """Read a trust file; a relative floor_file is taken from the folder it lies in.

        Raises:
            TrustError: missing, writable by everyone, not TOML, or a field is unknown, missing or wrong.
        """
        path = Path(path)
        content = PlainFile(
            path=path,
            limit_bytes=MAX_TRUST_BYTES,
            error=TrustError,
            next_step="Give a trust file by --trust; chexnet-deploy keygen prints the lines of one.",
            follows_links=True,
            refused_mode=0o002,
        ).read()
        try:
            # By way of JSON, where strict takes a list for a tuple and a string for a path; TOML's dates have no place.
            trust = cls.model_validate_json(json.dumps(tomllib.loads(content.decode("utf-8-sig"))))
        except ValidationError as err:
            raise TrustError(f"{path}: {describe(err)}. Correct it.") from err
        except (ValueError, TypeError, RecursionError) as err:
            raise TrustError(f"{path} is no trust file in TOML: {err}. Correct it.") from err
        if trust.floor_file is None:
            return trust
        return trust.model_copy(update={"floor_file": path.absolute().parent / trust.floor_file})

    def check_manifest(self, manifest: bytes, signatures: bytes, where: str) -> tuple[str, ...]:
        """Return the names of the trusted keys that signed a manifest.

        Args:
            manifest: the bytes of manifest.json.
            signatures: the bytes of manifest.sig.
            where: the bundle, for errors.

        Raises:
            TrustError: no trusted key has signed, or a trusted key's signature is for other bytes.
            MissingPackageError: cryptography is not installed.
        """
        return self._check_signature(manifest, MANIFEST_TYPE, "manifest", signatures, where, f"{where}/{SIGNATURE}")

    def check_site(self, site: bytes, signatures: bytes, where: str, signed_in: str) -> None:
        """Refuse a site file that no trusted key has signed; arguments and errors as check_manifest."""
        self._check_signature(site, SITE_TYPE, "site file", signatures, where, signed_in)

    def check_attestation(
        self, attestation: bytes, signatures: bytes, bundle_id: Sha256, model_sha256: Sha256, where: str
    ) -> Attestation:
        """Return a bundle's attestation, where it is a PASS that counts here.

        Args:
            attestation: the bytes of attestation.json.
            signatures: the bytes of attestation.sig.
            bundle_id: of the bundle it lies in.
            model_sha256: of its model file.
            where: the bundle, for errors.

        Raises:
            TrustError: no trusted key has signed it, it was changed, is of another bundle, no PASS, or by another spec.
            MissingPackageError: cryptography is not installed.
        """
        assert self.passing_specs is not None  # else none is asked for
        # Before it is parsed: what nobody vouches for gets to no parser.
        self.check_attestation_signature(attestation, signatures, where)
        found = Attestation.parse(attestation, f"{where}/{ATTESTATION}")
        found.refuse_other(bundle_id, model_sha256, where)
        if found.verdict != "PASS":
            raise TrustError(f"{where} is attested as {found.summary}; needed a PASS. Don't use it.")
        if found.spec_sha256 not in self.passing_specs:
            raise TrustError(
                f"{where} has its PASS by the spec {found.spec_sha256[:12]}…, needed one by "
                f"{' or '.join(f'{spec[:12]}…' for spec in self.passing_specs)}. "
                f"Run: chexnet-deploy bench --engine {where} --spec FILE, with that spec."
            )
        return found

    def check_attestation_signature(self, attestation: bytes, signatures: bytes, where: str) -> None:
        """Refuse an attestation that no trusted key has signed, whatever it says; arguments and errors as check_manifest."""
        signed_in = f"{where}/{ATTESTATION_SIGNATURE}"
        self._check_signature(attestation, ATTESTATION_TYPE, "attestation", signatures, where, signed_in)

    def refuse_unattested(self, where: str) -> TrustError:
        """Return the error for a bundle without a signed attestation."""
        return TrustError(
            f"{where} holds no signed attestation, and the trust file's passing_specs need a PASS. "
            f"Run: chexnet-deploy bench --engine {where}, then chexnet-deploy sign {where} --attestation FILE --key KEY.pem"
        )

    def without_pass(self) -> "Trust":
        """Return this trust for what comes before a PASS: building a plan, and `bench` itself."""
        return self.model_copy(update={"passing_specs": None})

    def without_floor(self) -> "Trust":
        """Return this trust for a bundle that is only read, as the one before: it may be older, and have no PASS here."""
        return self.model_copy(update={"min_release": None, "floor_file": None, "passing_specs": None})

    def _check_signature(
        self, content: bytes, payload_type: bytes, what: str, signatures: bytes, where: str, signed_in: str
    ) -> tuple[str, ...]:
        """Return the names of the trusted keys that signed a file of a bundle.

        Raises:
            TrustError: no trusted key has signed, or a trusted key's signature is for other bytes.
            MissingPackageError: cryptography is not installed.
        """
        verify = _import_verify_content()
        known = {key.fingerprint: key for key in self.keys}
        signers, others = [], []
        for signature in SignatureFile.parse(signatures, signed_in).signatures:
            key = known.get(signature.key)
            if key is None or key.is_revoked:
                others.append(f"{signature.key[:12]}… (unknown)" if key is None else f"{key.name} (revoked)")
            elif verify(key.raw, signature, content, payload_type):
                signers.append(key.name)
            else:
                raise TrustError(
                    f"{where}: the signature by {key.name} is not for this {what}. Don't use it; copy it again."
                )
        if not signers:
            raise TrustError(
                f"{where}: the {what} is signed by {', '.join(others)}; needed {self._wanted()}. Ask who delivered it."
            )
        return tuple(signers)

    def refuse_unsigned(self, where: str) -> TrustError:
        """Return the error for a bundle without manifest.sig."""
        return TrustError(
            f"{where} is not signed; needed {self._wanted()}. Take the signed bundle, "
            f"or sign it: chexnet-deploy sign {where} --key KEY.pem"
        )

    def check_release(self, release: Release | None, where: str) -> None:
        """Refuse another line or an older release; changes nothing.

        Raises:
            TrustError: says what was found and what is needed; or the floor file can't be read.
        """
        if self.line is None:
            return
        if release is None:
            raise TrustError(
                f"{where} names no release, needed one of {self.line}. Export it again with --line and --release."
            )
        if release.line != self.line:
            raise TrustError(f"{where} is of the model line {release.line}, needed {self.line}. Install one of that.")
        if self.min_release is not None:
            refuse_older(release, Release(line=self.line, number=self.min_release), "the trust file's min_release")
        if self.floor_file is not None:
            refuse_older(release, read_floor(self.floor_file), str(self.floor_file))

    def keep_release(self, release: Release | None) -> None:
        """Raise the floor to a release that has proven itself here.

        Raises:
            TrustError: a newer one has run meanwhile, or the floor file can't be written.
        """
        if self.floor_file is not None and release is not None:
            raise_floor(self.floor_file, release)

    def _wanted(self) -> str:
        return f"a signature by {' or '.join(key.name for key in self.keys if not key.is_revoked)}"


def _import_verify_content() -> Callable[[bytes, Signature, bytes, bytes], bool]:
    with require("signing", so="no signature can be verified"):
        from chexnet_deploy.bundle.signing.keys import verify_content
    return verify_content


def read_trust(path: Path | None) -> Trust | None:
    """Return what a trust file says, or None where none is named.

    Raises:
        TrustError: it can't be used.
    """
    return None if path is None else Trust.read(path)
