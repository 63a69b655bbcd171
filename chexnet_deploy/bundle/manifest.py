"""What a bundle says of its model: manifest.json, strict and versioned, and the names of the files beside it."""

import json
import math
from collections.abc import Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, TypeAlias, TypedDict

from pydantic import Field, StringConstraints, ValidationError, model_validator

from chexnet_deploy.bundle.signing.releases import Release
from chexnet_deploy.datasets.patients import FileSet, PatientSet
from chexnet_deploy.errors import BundleError
from chexnet_deploy.files import FirstFormat, Sha256, sha256_hex
from chexnet_deploy.images import Preprocessing, ScopePolicy
from chexnet_deploy.inputs import Record, describe

if TYPE_CHECKING:
    from typing_extensions import Unpack

MANIFEST = "manifest.json"
MANIFEST_SHA256 = "manifest.sha256"
PROBE = "probe.npz"
ONNX_MODEL = "model.onnx"
PLAN_MODEL = "model.plan"
UNKNOWN = "unknown"
"""Stands for a convolution's type where TensorRT's layer table does not say."""
Dialect: TypeAlias = Literal["typed", "mixed", "trt8", "cpu"]
"""The forms of int8; export/quantize/variants.py says what each is."""
FLOAT16_DIALECTS: tuple[Dialect, ...] = ("typed", "mixed")
"""Those with float16 around int8: for strongly typed networks, and for an ONNX Runtime that rounds float16."""


class Precision(str, Enum):
    """The type most convolutions are meant to run in."""

    FP32 = "fp32"
    FP16 = "fp16"
    INT8 = "int8"

    @property
    def type_name(self) -> str:
        """The type as numpy and the layer tables name it."""
        return {"fp32": "float32", "fp16": "float16", "int8": "int8"}[self.value]


class Calibration(Record):
    """Which images set the int8 ranges.

    Attributes:
        list_sha256: hash of the image names, in order, each with the SHA-256 of its pixels.
        n_images: how many.
        image_files: their files, so that nothing is measured on them; None where unknown.
        estimator: how a tensor's range was chosen from them.
        logit_mean: [C] of the fp32 model's logits on them; a service measures its images' drift from it.
        logit_sd: [C] standard deviation of these.
        activations: tensors of the model that hold quantised activations, in the graph's order; a service watches how much
            of them lies at the ends of their ranges.
    """

    list_sha256: Sha256
    n_images: Annotated[int, Field(ge=1)]
    image_files: FileSet | None = None
    estimator: str
    logit_mean: tuple[float, ...]
    logit_sd: tuple[Annotated[float, Field(ge=0.0)], ...]
    activations: tuple[str, ...] = ()


class Check(Record):
    """One measurement made before the bundle was kept.

    Attributes:
        name: what was measured, e.g. "max |logit difference| to torch".
        value: what came out.
        limit: what was allowed.
    """

    name: str
    value: float
    limit: float


class Target(Record):
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


class EngineCard(Record):
    """What the builder made, read from TensorRT's own layer table.

    Attributes:
        batch: smallest, tuned-for and largest batch of the plan's profile.
        conv_types: how many of the model's convolutions run in each type; UNKNOWN where the table does not say.
        fallbacks: ONNX names of the convolutions that run in another type than the precision's, as the bundle declares.
        n_kernels: layers that run something on the GPU.
        n_reformats: of them, those that only change a tensor's type or layout.
        bytes_per_image: what all kernels read and write of activations for one image; None where the table does not say.
        activation_bytes: device memory of one execution context.
        warnings: what TensorRT warned of while it built.
    """

    build_s: float
    plan_bytes: int
    batch: tuple[int, int, int]
    conv_types: dict[str, int]
    fallbacks: tuple[str, ...]
    n_kernels: int
    n_reformats: int
    bytes_per_image: int | None
    activation_bytes: int
    warnings: tuple[str, ...]


class Changes(TypedDict, total=False):
    """Fields that a child inherits unless they are given; see Manifest for their meaning."""

    precision: Precision
    dialect: Literal["float"] | Dialect
    head_bias: tuple[float, ...]
    calibration: Calibration | None
    tools: dict[str, str]
    float_convolutions: tuple[str, ...]
    weakest_convolutions: dict[str, float]
    target: Target | None
    engine: EngineCard | None


INHERITED = ("findings", "preprocessing", "operating_points", "checkpoint_sha256", "release", "trained_on", "scope")
"""Fields that every child has in common with its parent: what was trained, on whom, and for which images."""


class Manifest(Record):
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

    schema_version: FirstFormat = 1
    precision: Precision
    dialect: Literal["float"] | Dialect = "float"
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
    weakest_convolutions: dict[str, Annotated[float, Field(ge=0.0)]] = Field(default={})
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
            raise ValueError("an int8 model has dialect typed, mixed, trt8 or cpu; other models have dialect float")
        if (self.float_convolutions or self.weakest_convolutions) and self.precision is not Precision.INT8:
            raise ValueError("only an int8 model names the convolutions that stay in floating point")
        if not all(math.isfinite(bias) for bias in self.head_bias):
            raise ValueError("a head bias is not finite")
        return self

    @property
    def model_name(self) -> str:
        """The model's file name."""
        return ONNX_MODEL if self.target is None else PLAN_MODEL

    def child(
        self,
        own_id: Sha256,
        *,
        files: Mapping[str, Sha256],
        checks: Sequence[Check],
        probe_max_abs_logit_error: float,
        **changes: "Unpack[Changes]",
    ) -> "Manifest":
        """Return the manifest of a bundle that is made of this one; all that is not given is inherited.

        Args:
            own_id: the id of this manifest's bundle, which becomes the child's last ancestor.
            files: of the child, as hash_files returns them.
            checks: measured on the child.
            probe_max_abs_logit_error: likewise.
            changes: fields in which the child differs.

        Raises:
            ValidationError: the result is not a valid manifest.
            ValueError: a change to a field that every child inherits.
        """
        if not set(changes) <= set(Changes.__annotations__):
            raise ValueError(f"a child inherits {sorted(set(changes) - set(Changes.__annotations__))}")
        kept = {name: getattr(self, name) for name in (*INHERITED, *Changes.__annotations__)}
        given = {"files": files, "checks": checks, "probe_max_abs_logit_error": probe_max_abs_logit_error, **changes}
        return Manifest.model_validate({**kept, **given, "ancestors": (*self.ancestors, own_id)})

    def to_json(self) -> bytes:
        """Return the bytes of manifest.json."""
        return (self.model_dump_json(indent=2) + "\n").encode()


def hash_files(files: Mapping[str, bytes]) -> dict[str, str]:
    """Return the SHA-256 of each file's bytes, for `Manifest.files`."""
    return {name: sha256_hex(content) for name, content in files.items()}


def parse_manifest(path: Path, raw: bytes) -> Manifest:
    """Return what manifest.json says.

    Raises:
        BundleError: it is not JSON, or not a manifest that this version understands; named by path.
    """
    try:
        # json first: pydantic's own parser lets the last of two equal keys win.
        json.loads(raw, object_pairs_hook=_refuse_repeated_keys)
        return Manifest.model_validate_json(raw, strict=True)
    except ValidationError as err:
        raise BundleError(
            f"{path}: {describe(err)}. Use the chexnet-deploy version that wrote it, or export again."
        ) from err
    except (ValueError, RecursionError) as err:
        raise BundleError(f"{path} is not valid JSON: {err}. Copy the bundle again or export it again.") from err


def _refuse_repeated_keys(pairs: list[tuple[str, object]]) -> dict[str, object]:
    record = dict(pairs)
    if len(record) != len(pairs):
        raise ValueError("a key appears twice")
    return record
