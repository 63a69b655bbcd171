"""A bundle: a model file plus everything that is needed to use it rightly, in one directory.

    manifest.json     what the model is, where it came from, what was checked; strict, versioned
    model.onnx        or model.plan
    probe.npz         32 pixel arrays with the fp32 model's answers
    manifest.sha256   guards against accident
    manifest.sig      optional; guards against intent where a bundle is opened with trust, see signing/
    attestation.json  optional, with attestation.sig: what `bench` found of it, see signing/attestation.py

A site file may lie beside the directory, see site.py.

A bundle's id is the SHA-256 of manifest.json, which names the SHA-256 of every other file; signing changes no id. Nothing
here runs a model. Every file is opened once for each reading, without following links, and what is handed out was hashed.
"""

import errno
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from chexnet_deploy.bundle.manifest import (
    MANIFEST,
    MANIFEST_SHA256,
    ONNX_MODEL,
    PLAN_MODEL,
    PROBE,
    Manifest,
    parse_manifest,
)
from chexnet_deploy.bundle.probe import Probe
from chexnet_deploy.bundle.signing.attestation import (
    ATTESTATION,
    ATTESTATION_SIGNATURE,
    MAX_ATTESTATION_BYTES,
    Attestation,
)
from chexnet_deploy.bundle.signing.signatures import MAX_SIGNATURE_BYTES, SIGNATURE
from chexnet_deploy.bundle.signing.trust import Trust
from chexnet_deploy.bundle.site import Site, read_site
from chexnet_deploy.errors import BundleError, ChexnetError, TrustError
from chexnet_deploy.files import PlainFile, sha256_hex, write_directory

MAX_MANIFEST_BYTES = 65536  # a real one has up to 15 KB; anything near the cap is not ours
MAX_MODEL_BYTES = (
    2**29
)  # DenseNet-121 has 28 MB in fp32; a hostile file must not fill the memory before its hash is known
MAX_PROBE_BYTES = 2**27  # 32 images of 1024 px with their maps, uncompressed
_BESIDE = {MANIFEST, MANIFEST_SHA256, SIGNATURE, ATTESTATION, ATTESTATION_SIGNATURE}
"""What no manifest names."""
_MAX_NAMED = 5  # entries that an error names
_AGAIN = "Copy the bundle again or export it again."


class Bundle:
    """A verified bundle on disk.

    Attributes:
        path: its directory.
        manifest: what it says.
        id: SHA-256 of manifest.json; names this bundle in its descendants.
        signers: names of the trusted keys that signed it; empty where it was opened without trust.
        attestation: the PASS that trust asked for; None where it asked for none. open_session holds it to this machine.
    """

    def __init__(
        self,
        path: Path,
        manifest: Manifest,
        bundle_id: str,
        *,
        trust: Trust | None = None,
        signers: tuple[str, ...] = (),
        attestation: Attestation | None = None,
    ) -> None:
        self.path = path
        self.manifest = manifest
        self.id = bundle_id
        self.signers = signers
        self.attestation = attestation
        self._trust = trust

    @property
    def name(self) -> str:
        """Of its directory."""
        return self.path.resolve().name

    @property
    def findings(self) -> tuple[str, ...]:
        """Names of the logits, in order."""
        return self.manifest.findings

    @property
    def model_sha256(self) -> str:
        """Of the model file."""
        return self.manifest.files[self.manifest.model_name]

    @property
    def operating_points(self) -> Mapping[str, float]:
        """See Manifest."""
        return self.manifest.operating_points

    @classmethod
    def open(cls, path: Path | str, *, trust: Trust | None = None) -> "Bundle":
        """Verify every byte of a bundle and return it.

        Args:
            path: its directory.
            trust: whose signature it needs, which release at the least, and whose PASS; None checks hashes alone, which
                who can write the bundle can make anew.

        Raises:
            BundleError: a file is missing, extra, not a plain file, linked, or doesn't match its hash; or the manifest is
                not one this version understands.
            TrustError: it isn't signed by a trusted key, is older than trust allows, or has no PASS that trust asks for.
            MissingPackageError: trust is given and cryptography is not installed.
        """
        path = Path(path)
        _refuse_no_bundle(path)
        with _open_folder(path) as folder:
            raw = _file(path, MANIFEST, MAX_MANIFEST_BYTES, folder).read()
            actual = sha256_hex(raw)
            stated = _file(path, MANIFEST_SHA256, 256, folder).read()
            if stated != f"{actual}\n".encode():
                raise BundleError(
                    f"{path / MANIFEST} was changed after it was written: its sha256 is {actual[:12]}…, "
                    f"{MANIFEST_SHA256} says {stated[:12].decode('latin-1')!a}…. {_AGAIN}"
                )
            entries = _list_known(path, folder)
            signers: tuple[str, ...] = ()
            attestation: Attestation | None = None
            if trust is not None:
                # Before it is parsed: what nobody vouches for gets to no parser.
                if SIGNATURE not in entries:
                    raise trust.refuse_unsigned(str(path))
                signatures = _file(path, SIGNATURE, MAX_SIGNATURE_BYTES, folder, error=TrustError).read()
                signers = trust.check_manifest(raw, signatures, str(path))
            manifest = parse_manifest(path / MANIFEST, raw)
            if trust is not None:
                trust.check_release(manifest.release, str(path))
                if trust.passing_specs is not None:
                    if not {ATTESTATION, ATTESTATION_SIGNATURE} <= entries:
                        raise trust.refuse_unattested(str(path))
                    said = _file(path, ATTESTATION, MAX_ATTESTATION_BYTES, folder, error=TrustError).read()
                    signed = _file(path, ATTESTATION_SIGNATURE, MAX_SIGNATURE_BYTES, folder, error=TrustError).read()
                    model_sha256 = manifest.files[manifest.model_name]
                    attestation = trust.check_attestation(said, signed, actual, model_sha256, str(path))
            _refuse_extra(path, entries - {*_BESIDE, *manifest.files})
            bundle = cls(path, manifest, actual, trust=trust, signers=signers, attestation=attestation)
            for name in manifest.files:
                bundle._check_hash(name, bundle._listed_file(name, folder).sha256())
        return bundle

    @classmethod
    def write(cls, path: Path | str, manifest: Manifest, model: bytes, probe: bytes) -> "Bundle":
        """Write a new bundle in one step: afterwards it is there and complete, or not there.

        Args:
            path: where; nothing may be there yet.
            manifest: its `files` must match the bytes given.
            model: the ONNX file or the plan.
            probe: the probe as bytes.

        Raises:
            BundleError: something is at `path` already, or the disk is full or read-only.
        """
        path, raw = Path(path), manifest.to_json()
        files = {
            manifest.model_name: model,
            PROBE: probe,
            MANIFEST: raw,
            MANIFEST_SHA256: f"{sha256_hex(raw)}\n".encode(),
        }
        if len(raw) > MAX_MANIFEST_BYTES:
            raise BundleError(f"the manifest would have {len(raw)} bytes, more than {MAX_MANIFEST_BYTES}.")
        try:
            write_directory(path, files)
        except FileExistsError as err:
            taken = path if path.exists() else path.parent  # a file where a folder is needed
            raise BundleError(f"{taken} is there already. Choose another place, or delete it first.") from err
        except OSError as err:
            needed_mib = sum(map(len, files.values())) / 2**20
            hint = f" It needs {needed_mib:.0f} MiB." if err.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) else ""
            raise BundleError(f"{path} could not be written: {err.strerror}.{hint} Nothing was left behind.") from err
        return cls.open(path)

    def read_manifest_bytes(self) -> bytes:
        """Return manifest.json as it was verified: what is signed."""
        raw = _file(self.path, MANIFEST, MAX_MANIFEST_BYTES).read()
        if sha256_hex(raw) != self.id:
            raise BundleError(f"{self.path / MANIFEST} was changed since the bundle was opened. {_AGAIN}")
        return raw

    def read_model(self) -> bytes:
        """Return the model's bytes, hashed again: what is handed to a backend is what was verified."""
        return self._read_verified(self.manifest.model_name)

    def keep_release(self) -> None:
        """Raise the release floor, durably: nothing older runs here from now on. Without trust or floor it does nothing.

        Call it once the known answers hold, as `predict`, `serve` and `node` do: a release that doesn't run must not lock out
        the one that does. Opening a session, `bench` and `evaluate` leave the floor as it is.

        Raises:
            TrustError: a newer one has run meanwhile, or the floor file can't be written.
        """
        if self._trust is not None:
            self._trust.keep_release(self.manifest.release)

    def read_site(self) -> Site | None:
        """Return the site file that lies beside the bundle; None where nothing does.

        `predict`, `serve` and `node` decide by it; `bench`, `evaluate` and `export` don't look.

        Raises:
            BundleError: it was changed, is no site file, or is for another bundle.
            TrustError: the bundle was opened with trust, and no trusted key has signed this file.
        """
        return read_site(self.path, self.id, self.manifest, self._trust)

    def read_attestation(self) -> tuple[Attestation, str] | None:
        """Return what `bench` found of this bundle, whatever the verdict, with the file's SHA-256; None where it holds nothing.

        Raises:
            TrustError: it is of another bundle or model, or not as `bench` writes it; or the bundle was opened with trust, and no
                trusted key has signed it.
        """
        where, path = str(self.path), self.path / ATTESTATION
        if not (path.exists() or path.is_symlink()):
            return None
        raw = _file(self.path, ATTESTATION, MAX_ATTESTATION_BYTES, error=TrustError).read()
        if self._trust is not None:
            signed = _file(self.path, ATTESTATION_SIGNATURE, MAX_SIGNATURE_BYTES, error=TrustError).read()
            self._trust.check_attestation_signature(raw, signed, where)
        found = Attestation.parse(raw, str(path))
        found.refuse_other(self.id, self.model_sha256, where)
        return found, sha256_hex(raw)

    def read_probe(self) -> Probe:
        """Return the known answers."""
        return Probe.from_bytes(self.read_probe_bytes())

    def read_probe_bytes(self) -> bytes:
        """Return the known answers as bytes, to be copied into a descendant."""
        return self._read_verified(PROBE)

    def _read_verified(self, name: str) -> bytes:
        content = self._listed_file(name).read()
        self._check_hash(name, sha256_hex(content))
        return content

    def _listed_file(self, name: str, folder: int | None = None) -> PlainFile:
        return _file(self.path, name, MAX_PROBE_BYTES if name == PROBE else MAX_MODEL_BYTES, folder)

    def _check_hash(self, name: str, actual: str) -> None:
        stated = self.manifest.files[name]
        if actual != stated:
            raise BundleError(
                f"{self.path / name} does not match its manifest: sha256 {actual[:12]}…, expected {stated[:12]}…. {_AGAIN}"
            )

    def __repr__(self) -> str:
        return f"Bundle({str(self.path)!r}, {self.manifest.precision.value}, id={self.id[:12]})"


def _refuse_no_bundle(path: Path) -> None:
    try:
        is_folder = path.is_dir()
    except OSError as err:  # e.g. a name longer than the system allows
        raise BundleError(f"{path} is no bundle: {err.strerror}. Check the path.") from err
    if not is_folder:
        found = "a file" if path.exists() else "nothing"
        raise BundleError(f"{path} is no bundle: found {found}, needed a directory that `export` wrote.")
    if not (path / MANIFEST).exists():
        try:
            inside = sorted(str(file.parent) for file in path.glob(f"*/{MANIFEST}"))
        except OSError:  # it went away meanwhile: opening it says so
            inside = []
        if inside:
            raise BundleError(f"{path} is a folder of bundles. Give one of them: {', '.join(inside)}.")


@contextmanager
def _open_folder(path: Path) -> Iterator[int | None]:
    """Yield an open directory: all files are taken from this one, whatever its path names by then.

    Windows opens no directory; files are then taken by their paths.
    """
    if not hasattr(os, "O_DIRECTORY"):
        yield None
        return
    try:
        folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as err:
        raise BundleError(f"{path} can't be read: {err.strerror}. Check the disk and its permissions.") from err
    try:
        yield folder
    finally:
        os.close(folder)


def _file(
    path: Path, name: str, limit_bytes: int, folder: int | None = None, *, error: type[ChexnetError] = BundleError
) -> PlainFile:
    return PlainFile(path=path / name, folder=folder, limit_bytes=limit_bytes, error=error, next_step=_AGAIN)


def _list_known(path: Path, folder: int | None) -> set[str]:
    """Return the names in a bundle; of a folder with many others, enough to refuse it."""
    known = {*_BESIDE, ONNX_MODEL, PLAN_MODEL, PROBE}
    entries: set[str] = set()
    try:
        with os.scandir(path if folder is None else folder) as listing:
            for entry in listing:
                entries.add(entry.name)
                if len(entries - known) > _MAX_NAMED:
                    break
    except OSError as err:
        raise BundleError(f"{path} can't be read: {err.strerror}. Check the disk and its permissions.") from err
    _refuse_extra(path, entries - known)
    return entries


def _refuse_extra(path: Path, extra: set[str]) -> None:
    if extra:
        # As ascii(): a name may hold line breaks, or bytes that no terminal can show.
        names = ", ".join(ascii(name) for name in sorted(extra)[:_MAX_NAMED])
        more = " and more" if len(extra) > _MAX_NAMED else ""
        raise BundleError(f"{path} holds {names}{more}, which its manifest does not name. Remove or re-export.")


def find_reference(engine: Bundle, *, trust: Trust | None = None) -> Bundle:
    """Return the fp32 bundle an engine came from: itself, or the one beside it whose id its ancestry names.

    Args:
        engine: opened.
        trust: what the fp32 bundle must show, too.

    Raises:
        BundleError: none lies beside it, or none that trust accepts.
    """
    if not engine.manifest.ancestors:
        return engine
    wanted = engine.manifest.ancestors[0]
    for folder in sorted(engine.path.resolve().parent.iterdir()):
        if (folder / "manifest.json").is_file():
            try:
                bundle = Bundle.open(folder, trust=trust)
            except (BundleError, TrustError):
                continue  # a damaged or foreign neighbour is nobody's ancestor
            if bundle.id == wanted:
                return bundle
    how = "" if trust is None else " and signed by a trusted key"
    raise BundleError(
        f"the fp32 bundle that {engine.path} came from (id {wanted[:12]}…) does not lie beside it, whole{how}. "
        f"Give it by --reference."
    )
