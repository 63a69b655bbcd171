"""A bundle: a model file plus everything that is needed to use it rightly, in one directory.

    manifest.json     what the model is, where it came from, what was checked; strict, versioned
    model.onnx        or model.plan
    probe.npz         32 pixel arrays with the fp32 model's answers
    manifest.sha256   guards against accident; against intent a signature is needed, which this file is not

A bundle's id is the SHA-256 of manifest.json, which names the SHA-256 of every other file. Nothing here runs a model.
"""

import errno
import json
import math
import stat
from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, model_validator

from chexnet_deploy.errors import BundleError
from chexnet_deploy.files import Sha256, sha256_hex, write_directory
from chexnet_deploy.preprocessing import Preprocessing
from chexnet_deploy.probe import Probe
from chexnet_deploy.scope import ScopePolicy
from chexnet_deploy.splits import PatientSet

MANIFEST = "manifest.json"
MANIFEST_SHA256 = "manifest.sha256"
PROBE = "probe.npz"
ONNX_MODEL = "model.onnx"
PLAN_MODEL = "model.plan"
MAX_MANIFEST_BYTES = 65536  # a real one has about 3 KB; anything near the cap is not ours


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
    """

    list_sha256: Sha256
    n_images: Annotated[int, Field(ge=1)]
    estimator: str


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
        files: SHA-256 of every file in the bundle but manifest.json and manifest.sha256.
        checkpoint_sha256: the checkpoint file all of this came from.
        ancestors: ids of the bundles this one was made from, oldest first; empty for the fp32 bundle.
        probe_max_abs_logit_error: largest |logit difference| to the fp32 model on the probe, when it was kept.
        checks: what was measured before the bundle was kept.
        tools: version of each tool that took part.
        float_convolutions: ONNX node names of the convolutions of an int8 model that stay in floating point.
        trained_on: the patients the weights were fitted to, so that nobody is evaluated on them; None where unknown.
        scope: the radiographs the model is meant for; None stands for ScopePolicy's defaults.
        target: for plans only.
        engine: for plans only.
    """

    schema_version: Literal[1] = 1
    precision: Precision
    dialect: Literal["float", "typed", "trt8"] = "float"
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
        if (self.precision is Precision.INT8) != (self.dialect != "float"):
            raise ValueError("an int8 model has dialect typed or trt8; other models have dialect float")
        if self.float_convolutions and self.precision is not Precision.INT8:
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
    """

    def __init__(self, path: Path, manifest: Manifest, bundle_id: str) -> None:
        self.path = path
        self.manifest = manifest
        self.id = bundle_id

    @classmethod
    def open(cls, path: Path) -> "Bundle":
        """Verify every byte of a bundle and return it.

        Raises:
            BundleError: a file is missing, extra, not a plain file, or doesn't match its hash; or the manifest is not
                one this version understands.
        """
        try:
            is_folder = path.is_dir()
        except OSError as err:  # e.g. a name longer than the system allows
            raise BundleError(f"{path} is no bundle: {err.strerror}. Check the path.") from err
        if not is_folder:
            found = "a file" if path.exists() else "nothing"
            raise BundleError(f"{path} is no bundle: found {found}, needed a directory that `export` wrote.")
        if not (path / MANIFEST).exists():
            inside = sorted(str(file.parent) for file in path.glob(f"*/{MANIFEST}"))
            if inside:
                raise BundleError(f"{path} is a folder of bundles. Give one of them: {', '.join(inside)}.")
        raw = _read_plain_file(path / MANIFEST, limit_bytes=MAX_MANIFEST_BYTES)
        stated = _read_plain_file(path / MANIFEST_SHA256, limit_bytes=256).decode("ascii", "replace").strip()
        actual = sha256_hex(raw)
        if stated != actual:
            raise BundleError(
                f"{path / MANIFEST} was changed after it was written: its sha256 is {actual[:12]}…, "
                f"{MANIFEST_SHA256} says {stated[:12]}…. Copy the bundle again or export it again."
            )
        bundle = cls(path, _parse_manifest(path / MANIFEST, raw), actual)
        expected = {MANIFEST, MANIFEST_SHA256, *bundle.manifest.files}
        extra = sorted({entry.name for entry in path.iterdir()} - expected)
        if extra:
            raise BundleError(
                f"{path} holds {', '.join(extra)}, which its manifest does not name. Remove or re-export."
            )
        for name in bundle.manifest.files:
            bundle._read_verified(name)
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

    def read_model(self) -> bytes:
        """Return the model's bytes, hashed again: what is handed to a backend is what was verified."""
        return self._read_verified(self.manifest.model_name)

    def read_probe(self) -> Probe:
        """Return the known answers."""
        return Probe.from_bytes(self.read_probe_bytes())

    def read_probe_bytes(self) -> bytes:
        """Return the known answers as bytes, to be copied into a descendant."""
        return self._read_verified(PROBE)

    def _read_verified(self, name: str) -> bytes:
        content = _read_plain_file(self.path / name, limit_bytes=2**31)
        actual, stated = sha256_hex(content), self.manifest.files[name]
        if actual != stated:
            raise BundleError(
                f"{self.path / name} does not match its manifest: sha256 {actual[:12]}…, expected {stated[:12]}…. "
                f"Copy the bundle again or export it again."
            )
        return content

    def __repr__(self) -> str:
        return f"Bundle({str(self.path)!r}, {self.manifest.precision.value}, id={self.id[:12]})"


def hash_files(files: Mapping[str, bytes]) -> dict[str, str]:
    """Return the SHA-256 of each file's bytes, for `Manifest.files`."""
    return {name: sha256_hex(content) for name, content in files.items()}


def _read_plain_file(path: Path, *, limit_bytes: int) -> bytes:
    try:
        # lstat, not stat: a link could point outside the bundle, and change after it was checked.
        status = path.lstat()
        if not stat.S_ISREG(status.st_mode):
            raise BundleError(f"{path} is not a plain file. Copy the bundle again without links.")
        if status.st_size > limit_bytes:
            raise BundleError(
                f"{path} has {status.st_size} bytes, more than the {limit_bytes} it may have. Export it again."
            )
        return path.read_bytes()
    except FileNotFoundError as err:
        raise BundleError(f"{path} is missing. Copy the bundle again or export it again.") from err
    except OSError as err:
        raise BundleError(f"{path} can't be read: {err.strerror}. Check the disk and its permissions.") from err


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
