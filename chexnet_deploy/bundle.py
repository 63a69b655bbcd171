"""A bundle: a model file plus everything that is needed to use it rightly, in one directory.

    manifest.json     what the model is, where it came from, what was checked; strict, versioned
    model.onnx        or model.plan
    probe.npz         32 pixel arrays with the fp32 model's answers
    manifest.sha256   guards against accident
    manifest.sig      optional; guards against intent where a bundle is opened with trust, see signing/

A bundle's id is the SHA-256 of manifest.json, which names the SHA-256 of every other file; signing changes no id. Nothing
here runs a model. Every file is opened once for each reading, without following links, and what is handed out was hashed.
"""

import errno
import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, model_validator

from chexnet_deploy.errors import BundleError, ChexnetError, TrustError
from chexnet_deploy.files import Sha256, sha256_hex, write_directory
from chexnet_deploy.plainfiles import PlainFile
from chexnet_deploy.preprocessing import Preprocessing
from chexnet_deploy.probe import Probe
from chexnet_deploy.scope import ScopePolicy
from chexnet_deploy.signing.release import Release
from chexnet_deploy.signing.signatures import MAX_SIGNATURE_BYTES, SIGNATURE
from chexnet_deploy.signing.trust import Trust
from chexnet_deploy.splits import PatientSet

MANIFEST = "manifest.json"
MANIFEST_SHA256 = "manifest.sha256"
PROBE = "probe.npz"
ONNX_MODEL = "model.onnx"
PLAN_MODEL = "model.plan"
MAX_MANIFEST_BYTES = 65536  # a real one has about 3 KB; anything near the cap is not ours
MAX_MODEL_BYTES = (
    2**29
)  # DenseNet-121 has 28 MB in fp32; a hostile file must not fill the memory before its hash is known
MAX_PROBE_BYTES = 2**27  # 32 images of 1024 px with their maps, uncompressed
_MAX_NAMED = 5  # entries that an error names
_AGAIN = "Copy the bundle again or export it again."


class Precision(str, Enum):
    """The type most convolutions are meant to run in."""

    FP32 = "fp32"
    FP16 = "fp16"
    INT8 = "int8"

    @property
    def type_name(self) -> str:
        """The type as numpy and the layer tables name it."""
        return {"fp32": "float32", "fp16": "float16", "int8": "int8"}[self.value]


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Calibration(_Record):
    """Which images set the int8 ranges.

    Attributes:
        list_sha256: hash of the image names, in order, each with the SHA-256 of its pixels.
        n_images: how many.
        estimator: how a tensor's range was chosen from them.
        logit_mean: [C] of the fp32 model's logits on them; a service measures its images' drift from it.
        logit_sd: [C] standard deviation of these.
    """

    list_sha256: Sha256
    n_images: Annotated[int, Field(ge=1)]
    estimator: str
    logit_mean: tuple[float, ...]
    logit_sd: tuple[Annotated[float, Field(ge=0.0)], ...]


class Check(_Record):
    """One measurement made before the bundle was kept.

    Attributes:
        name: what was measured, e.g. "max |logit difference| to torch".
        value: what came out.
        limit: what was allowed.
    """

    name: str
    value: float
    limit: float


class Target(_Record):
    """Where a plan is valid; read from the machine it was built on.

    Attributes:
        tensorrt: its version.
        driver: the CUDA version that the driver supports, e.g. "12.4".
    """

    gpu: str
    compute_capability: str
    backend: Literal["tensorrt", "tensorrt_rtx"]
    tensorrt: str
    driver: Annotated[str, StringConstraints(pattern=r"^\d+\.\d+$")]
    platform: str


class EngineCard(_Record):
    """What the builder made, read from TensorRT's own layer table.

    Attributes:
        batch: smallest, tuned-for and largest batch of the plan's profile.
        conv_types: how many of the model's convolutions run in each type.
        fallbacks: ONNX names of the convolutions that run in another type than the precision's, as the bundle declares.
        n_layers: in TensorRT's own table.
        n_reformats: of them, those that only change a tensor's type or layout.
        activation_bytes: device memory of one execution context.
        warnings: what TensorRT warned of while it built.
    """

    build_s: float
    plan_bytes: int
    batch: tuple[int, int, int]
    conv_types: dict[str, int]
    fallbacks: tuple[str, ...]
    n_layers: int
    n_reformats: int
    activation_bytes: int
    warnings: tuple[str, ...]


class Manifest(_Record):
    """What a bundle says of its model.

    Attributes:
        findings: names of the logits, in order.
        head_bias: [C] bias of the linear head; mean over space of cam + head_bias = logits.
        operating_points: probability at and above which a finding is called present, chosen on validation patients.
        files: SHA-256 of every file in the bundle but manifest.json, manifest.sha256 and manifest.sig.
        checkpoint_sha256: the checkpoint file all of this came from.
        ancestors: ids of the bundles this one was made from, oldest first; empty for the fp32 bundle.
        probe_max_abs_logit_error: largest |logit difference| to the fp32 model on the probe, when it was kept.
        checks: what was measured before the bundle was kept.
        tools: version of each tool that took part.
        float_convolutions: ONNX node names of the convolutions of an int8 model that stay in floating point.
        weakest_convolutions: those that int8 hurts most, with the RMS logit difference each makes alone as a share of the
            logits' standard deviation; measured only where the gate failed with all of them in int8.
        release: which release of which model line this is; None for a bundle that is nobody's release.
        trained_on: the patients the weights were fitted to, so that nobody is evaluated on them; None where unknown.
        scope: the radiographs the model is meant for; None stands for ScopePolicy's defaults.
        target: for plans only.
        engine: for plans only.
    """

    schema_version: Literal[1] = 1
    precision: Precision
    dialect: Literal["float", "typed", "trt8", "cpu"] = "float"
    findings: Annotated[tuple[str, ...], Field(min_length=1, max_length=256)]
    preprocessing: Preprocessing
    head_bias: tuple[float, ...]
    operating_points: dict[str, Annotated[float, Field(ge=0.0, le=1.0)]]
    files: dict[str, Sha256]
    checkpoint_sha256: Sha256
    ancestors: tuple[Sha256, ...] = ()
    calibration: Calibration | None = None
    probe_max_abs_logit_error: Annotated[float, Field(ge=0.0)]
    checks: tuple[Check, ...] = ()
    tools: dict[str, str]
    float_convolutions: tuple[str, ...] = ()
    weakest_convolutions: dict[str, Annotated[float, Field(ge=0.0)]] = {}
    release: Release | None = None
    trained_on: PatientSet | None = None
    scope: ScopePolicy | None = None
    target: Target | None = None
    engine: EngineCard | None = None

    @model_validator(mode="after")
    def _is_consistent(self) -> "Manifest":
        model_name = ONNX_MODEL if self.target is None else PLAN_MODEL
        if set(self.files) != {model_name, PROBE}:
            raise ValueError(f"files must be {model_name} and {PROBE}, got {sorted(self.files)}")
        if (self.target is None) != (self.engine is None):
            raise ValueError("a plan has a target and an engine card, and no other model has either")
        if len(set(self.findings)) != len(self.findings):
            raise ValueError("a finding is named twice")
        if len(self.head_bias) != len(self.findings):
            raise ValueError(f"{len(self.head_bias)} head biases for {len(self.findings)} findings")
        unknown = sorted(set(self.operating_points) - set(self.findings))
        if unknown:
            raise ValueError(f"operating points for unknown findings {unknown}")
        if (self.precision is Precision.INT8) != (self.calibration is not None):
            raise ValueError("an int8 model has a calibration and no other model has one")
        if self.calibration is not None:
            n_values = {len(self.calibration.logit_mean), len(self.calibration.logit_sd)}
            if n_values != {len(self.findings)}:
                raise ValueError("the calibration needs a logit_mean and a logit_sd for each finding")
        if (self.precision is Precision.INT8) != (self.dialect != "float"):
            raise ValueError("an int8 model has dialect typed, trt8 or cpu; other models have dialect float")
        if (self.float_convolutions or self.weakest_convolutions) and self.precision is not Precision.INT8:
            raise ValueError("only an int8 model names the convolutions that stay in floating point")
        if not all(math.isfinite(bias) for bias in self.head_bias):
            raise ValueError("a head bias is not finite")
        return self

    @property
    def model_name(self) -> str:
        """The model's file name."""
        return ONNX_MODEL if self.target is None else PLAN_MODEL

    def to_json(self) -> bytes:
        """Return the bytes of manifest.json."""
        return (self.model_dump_json(indent=2) + "\n").encode()


class Bundle:
    """A verified bundle on disk.

    Attributes:
        path: its directory.
        manifest: what it says.
        id: SHA-256 of manifest.json; names this bundle in its descendants.
        signers: names of the trusted keys that signed it; empty where it was opened without trust.
    """

    def __init__(
        self,
        path: Path,
        manifest: Manifest,
        bundle_id: str,
        *,
        trust: Trust | None = None,
        signers: tuple[str, ...] = (),
    ) -> None:
        self.path = path
        self.manifest = manifest
        self.id = bundle_id
        self.signers = signers
        self._trust = trust

    @classmethod
    def open(cls, path: Path, *, trust: Trust | None = None) -> "Bundle":
        """Verify every byte of a bundle and return it.

        Args:
            path: its directory.
            trust: whose signature it needs, and which release at the least; None checks hashes alone, which who can write
                the bundle can make anew.

        Raises:
            BundleError: a file is missing, extra, not a plain file, linked, or doesn't match its hash; or the manifest is
                not one this version understands.
            TrustError: it isn't signed by a trusted key, or it is older than trust allows.
            MissingPackageError: trust is given and cryptography is not installed.
        """
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
            if trust is not None:
                # Before it is parsed: what nobody vouches for gets to no parser.
                if SIGNATURE not in entries:
                    raise trust.refuse_unsigned(str(path))
                signatures = _file(path, SIGNATURE, MAX_SIGNATURE_BYTES, folder, error=TrustError).read()
                signers = trust.check_signature(raw, signatures, str(path))
            manifest = _parse_manifest(path / MANIFEST, raw)
            if trust is not None:
                trust.check_release(manifest.release, str(path))
            _refuse_extra(path, entries - {MANIFEST, MANIFEST_SHA256, SIGNATURE, *manifest.files})
            bundle = cls(path, manifest, actual, trust=trust, signers=signers)
            for name in manifest.files:
                bundle._check_hash(name, bundle._listed_file(name, folder).sha256())
        return bundle

    @classmethod
    def write(cls, path: Path, manifest: Manifest, model: bytes, probe: bytes) -> "Bundle":
        """Write a new bundle in one step: afterwards it is there and complete, or not there.

        Args:
            path: where; nothing may be there yet.
            manifest: its `files` must match the bytes given.
            model: the ONNX file or the plan.
            probe: the probe as bytes.

        Raises:
            BundleError: something is at `path` already, or the disk is full or read-only.
        """
        raw = manifest.to_json()
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
        """Let nothing older run here from now on, where the trust it was opened with remembers releases.

        Called by open_session once the known answers hold: a release that doesn't run must not lock out the one that does.

        Raises:
            TrustError: a newer one has run meanwhile, or the floor file can't be written.
        """
        if self._trust is not None:
            self._trust.keep_release(self.manifest.release)

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


def hash_files(files: Mapping[str, bytes]) -> dict[str, str]:
    """Return the SHA-256 of each file's bytes, for `Manifest.files`."""
    return {name: sha256_hex(content) for name, content in files.items()}


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
def _open_folder(path: Path) -> Iterator[int]:
    """Yield an open directory: all files are taken from this one, whatever its path names by then."""
    try:
        folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
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


def _list_known(path: Path, folder: int) -> set[str]:
    """Return the names in a bundle; of a folder with many others, enough to refuse it."""
    known = {MANIFEST, MANIFEST_SHA256, SIGNATURE, ONNX_MODEL, PLAN_MODEL, PROBE}
    entries: set[str] = set()
    try:
        with os.scandir(folder) as listing:
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


def _parse_manifest(path: Path, raw: bytes) -> Manifest:
    try:
        # json first: pydantic's own parser lets the last of two equal keys win.
        json.loads(raw, object_pairs_hook=_refuse_repeated_keys)
        return Manifest.model_validate_json(raw, strict=True)
    except ValidationError as err:
        first = err.errors()[0]
        where = ".".join(map(str, first["loc"])) or "manifest"
        raise BundleError(
            f"{path}: {where}: {first['msg']} ({err.error_count()} problem(s)). "
            f"Use the chexnet-deploy version that wrote it, or export again."
        ) from err
    except (ValueError, RecursionError) as err:
        raise BundleError(f"{path} is not valid JSON: {err}. Copy the bundle again or export it again.") from err


def _refuse_repeated_keys(pairs: list[tuple[str, object]]) -> dict[str, object]:
    record = dict(pairs)
    if len(record) != len(pairs):
        raise ValueError("a key appears twice")
    return record
