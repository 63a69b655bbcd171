"""What an engine must be and what it must pass, read from engines/*.toml.

A spec is written before anything is measured: margins chosen after looking at results prove nothing.
"""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, StringConstraints, ValidationError, model_validator

from chexnet_deploy.bundle.manifest import Precision
from chexnet_deploy.datasets.findings import FINDINGS
from chexnet_deploy.errors import SpecError
from chexnet_deploy.evaluation.dicom_times import DicomKind
from chexnet_deploy.inputs import Record, describe, name_some, read_toml

_PACKAGE = Path(__file__).parents[1]
# In the wheel the specs lie inside the package; in a checkout beside it.
SPEC_FOLDERS = (_PACKAGE / "engines", _PACKAGE.parent / "engines")

Positive = Annotated[float, Field(gt=0.0)]
Share = Annotated[float, Field(gt=0.0, le=1.0)]


class BatchProfile(Record):
    """The batch sizes an engine takes: smallest, the one it is tuned for, largest."""

    min: Annotated[int, Field(ge=1)] = 1
    opt: Annotated[int, Field(ge=1)] = 1
    max: Annotated[int, Field(ge=1)] = 16

    @model_validator(mode="after")
    def _is_ordered(self) -> "BatchProfile":
        if not self.min <= self.opt <= self.max:
            raise ValueError(f"need min <= opt <= max, got {self.min}, {self.opt}, {self.max}")
        return self


class LatencyGate(Record):
    """Limits for batch 1, on the machine the spec was measured on."""

    p50_ms: Positive
    p99_ms: Positive


class Gate(Record):
    """What a candidate must pass beside the fp32 model it came from; a limit of None is measured and not gated.

    Attributes:
        auroc_margin: how much AUROC a finding may lose; per finding, `default` for the rest.
        min_positive_patients: a finding with fewer is not assessable.
        max_abs_probability_difference: on every image and finding.
        p999_abs_probability_difference: 99.9 % quantile over images and findings.
        logit_noise_share: root mean square logit difference of each assessable finding as a share of the reference logits' standard
            deviation. A model that answers everyone alike can't pass by differing little.
        flip_share: share of the decisions at operating points that differ, over all findings that have one.
        likeliest_finding_agreement: share of images on which both find the same finding likeliest, at the least.
        calibration_error_growth: of the root mean square calibration error of each finding, in probability; see
            metrics.calibration.
        invariance_abs_probability_difference: between an image's answers in any slot, batch size or thread.
        latency: limits, "unproven" where nobody has measured this target yet (the verdict is then INCONCLUSIVE), or
            "not gated" for specs that promise no speed.
        dicom_p99_over_model_p50: by kind of DICOM file, the 99th percentile of the time from the file to its report, as a multiple
            of the model's own median.
    """

    auroc_margin: dict[str, Annotated[float, Field(gt=0.0, le=0.5)]]
    min_positive_patients: Annotated[int, Field(ge=1)] = 20
    max_abs_probability_difference: Share
    p999_abs_probability_difference: Share
    logit_noise_share: Share | None = None
    flip_share: Share | None = None
    likeliest_finding_agreement: Share | None = None
    calibration_error_growth: Share | None = None
    invariance_abs_probability_difference: Share = 0.02
    latency: LatencyGate | Literal["unproven", "not gated"]
    dicom_p99_over_model_p50: dict[DicomKind, Positive] | None = None

    @model_validator(mode="after")
    def _has_a_default(self) -> "Gate":
        if "default" not in self.auroc_margin:
            raise ValueError("auroc_margin needs `default`")
        return self

    def refuse_strangers(self, findings: Collection[str]) -> None:
        """Refuse a margin of a finding that no model here has: misspelt, its finding would get the default one.

        Args:
            findings: of the models; ChestX-ray14's may be named for all.

        Raises:
            SpecError: names it.
        """
        strangers = sorted(set(self.auroc_margin) - {"default", *FINDINGS, *findings})
        if strangers:
            raise SpecError(
                f"the spec has an auroc_margin for {name_some(strangers)}, found in no model here; needed names out of "
                f"{name_some(sorted(findings))}. Correct the spec."
            )

    def margin_of(self, finding: str) -> float:
        """Return how much AUROC this finding may lose."""
        return self.auroc_margin.get(finding, self.auroc_margin["default"])


class BuildOptions(Record):
    """How TensorRT builds; ONNX Runtime has no use for it.

    Attributes:
        workspace_mib: scratch memory that one kernel may take; None is TensorRT's own limit, the whole GPU.
        optimization_level: TensorRT's own scale of effort.
        hardware_compatibility: "ampere_plus" gives a slower plan that runs on every GPU from Ampere on. Version
            compatibility is not offered: such plans hold host code.
    """

    workspace_mib: Annotated[int, Field(ge=16, le=65536)] | None = None
    optimization_level: Annotated[int, Field(ge=0, le=5)] = 3
    hardware_compatibility: Literal["none", "ampere_plus"] = "none"

    @model_validator(mode="before")
    @classmethod
    def _names_no_dla(cls, fields: object) -> object:
        if isinstance(fields, Mapping) and any("dla" in str(name).lower() for name in fields):
            raise ValueError("DLA is not supported: it has no Q/DQ int8 and no uint8 input. Build for the GPU")
        return fields


class EngineSpec(Record):
    """One engine as promised: precision, batch sizes, how it is built and the gate it must pass.

    Attributes:
        gpu: substring that the GPU's name must contain, e.g. "L4"; None for any. A spec for ONNX Runtime names none.
    """

    description: str
    precision: Precision
    gpu: Annotated[str, StringConstraints(min_length=1)] | None = None
    batch: BatchProfile = BatchProfile()
    build: BuildOptions = BuildOptions()
    gate: Gate

    def is_for(self, gpu: str) -> bool:
        """Say whether this spec may be used on a GPU of that full name."""
        return self.gpu is None or self.gpu in gpu


def spec_names() -> list[str]:
    """Return the names of the specs that come with the package."""
    return sorted(file.stem for folder in SPEC_FOLDERS if folder.is_dir() for file in folder.glob("*.toml"))


def read_spec(name_or_path: str) -> EngineSpec:
    """Read a spec by the name of one that comes with the package, or by path.

    Raises:
        SpecError: no such spec, not TOML, or a field is unknown, missing or out of range.
    """
    return _parse(find_spec(name_or_path))


def find_spec(name_or_path: str) -> Path:
    """Return a spec's file.

    Raises:
        SpecError: no such spec.
    """
    if name_or_path.endswith(".toml"):
        return Path(name_or_path)
    for folder in SPEC_FOLDERS:
        if (folder / f"{name_or_path}.toml").is_file():
            return folder / f"{name_or_path}.toml"
    raise SpecError(f"no spec named {name_or_path!r}. There are {', '.join(spec_names())}; or give a path to a .toml.")


def _parse(path: Path) -> EngineSpec:
    try:
        return EngineSpec.model_validate(read_toml(path))
    except ValidationError as err:
        raise SpecError(f"{path}: {describe(err)}. See engines/README.md for the fields.") from err
