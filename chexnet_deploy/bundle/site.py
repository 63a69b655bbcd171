"""A site file: operating points chosen on a hospital's own patients, beside the bundle they are for; and who decides.

    BUNDLE.site.json        the points, what is guaranteed of them, on whose images they were chosen, and its own SHA-256
    BUNDLE.site.json.sig    optional; as manifest.sig, for a site file

It names the bundle's id, so another bundle refuses it. Where it lies beside a bundle, its points alone decide: a finding that
it leaves out has none. evaluation/on_site.py writes it; metrics/guarantee.py has the statistics.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Final, Literal, TypeAlias

from pydantic import Field, ValidationError, model_validator

from chexnet_deploy.bundle.manifest import Manifest
from chexnet_deploy.bundle.signing.signatures import MAX_SIGNATURE_BYTES
from chexnet_deploy.bundle.signing.trust import Trust
from chexnet_deploy.errors import BundleError, TrustError
from chexnet_deploy.files import FirstFormat, PlainFile, Sha256, sha256_hex
from chexnet_deploy.inputs import Record, describe, name_some

Rate: TypeAlias = Literal["sensitivity", "specificity", "ppv", "npv"]

SITE_SUFFIX: Final = ".site.json"
MAX_SITE_BYTES: Final = 2**20  # 256 findings with long names take less
_AGAIN: Final = "Calibrate again, or delete it to go back to the bundle's own operating points."

Share = Annotated[float, Field(ge=0.0, le=1.0)]
Chance = Annotated[float, Field(gt=0.0, lt=1.0)]


class Evidence(Record):
    """What a guaranteed rate rests on.

    Attributes:
        n_patients: whose images, one each, the bound is of.
        n_wrong: of these images, how many the point gets wrong.
    """

    n_patients: Annotated[int, Field(ge=1)]
    n_wrong: Annotated[int, Field(ge=0)]


class SitePoint(Record):
    """One finding's operating point; between two thresholds nothing is said.

    Attributes:
        present_at: probability at and above which it is called present; None where it never is.
        absent_below: probability below which it is called absent; None where it never is.
        guaranteed: the rates of `Site.asked` that hold for this finding.
        not_guaranteed: the others, with the reason.
        sensitivity: share of the images with the finding that are called present, of those the point was chosen on.
        specificity: share of the images without it that are called absent.
        undetermined: share of all images between the thresholds.
    """

    present_at: Share | None
    absent_below: Share | None
    guaranteed: Annotated[dict[Rate, Evidence], Field(min_length=1)]
    not_guaranteed: dict[Rate, str] = Field(default={})
    sensitivity: Share | None
    specificity: Share | None
    undetermined: Share

    @model_validator(mode="after")
    def _is_consistent(self) -> "SitePoint":
        if self.present_at is not None and self.absent_below is not None and self.absent_below > self.present_at:
            raise ValueError("absent_below is above present_at")
        return self


class Site(Record):
    """What a site file says.

    Attributes:
        bundle: id of the bundle it is for.
        asked: the rates asked for, each of each finding by itself.
        confidence: with which each rate holds for new patients of the site.
        points: by finding.
        without: findings that have no point, with the reason.
        data: whose images, in words.
        patients_note: whether the model has seen these patients.
        n_images: that were answered; n_refused that `predict` refuses.
        inputs_sha256: files that were read beside images, by name.
        backend: what ran the model.
        made_utc: when.
        tools: versions.
    """

    schema_version: FirstFormat = 1
    bundle: Sha256
    asked: Annotated[dict[Rate, Chance], Field(min_length=1)]
    confidence: Chance
    points: Annotated[dict[str, SitePoint], Field(min_length=1)]
    without: dict[str, str]
    data: str
    patients_note: tuple[str, ...]
    n_images: Annotated[int, Field(ge=1)]
    n_patients: Annotated[int, Field(ge=1)]
    n_refused: Annotated[int, Field(ge=0)]
    inputs_sha256: dict[str, Sha256]
    backend: str
    made_utc: str
    tools: dict[str, str]

    @model_validator(mode="after")
    def _is_consistent(self) -> "Site":
        for finding, point in self.points.items():
            if sorted([*point.guaranteed, *point.not_guaranteed]) != sorted(self.asked):
                raise ValueError(f"{finding} needs each rate that was asked for once, guaranteed or not")
        if set(self.points) & set(self.without):
            raise ValueError("a finding is said to have an operating point and to have none")
        return self

    @property
    def id(self) -> str:
        """SHA-256 of all it says; names it in results."""
        return sha256_hex(self.model_dump_json().encode())

    @property
    def in_words(self) -> str:
        """What is guaranteed, for a result."""
        rates = " and ".join(f"{rate_name(rate)} at least {least:g}" for rate, least in self.asked.items())
        return f"site {self.id[:12]}: {rates} with confidence {self.confidence:g}"

    def to_json(self) -> bytes:
        """Return the bytes of the site file."""
        return (_SiteFile(sha256=self.id, site=self).model_dump_json(indent=2) + "\n").encode()


class _SiteFile(Record):
    sha256: Sha256
    site: Site


@dataclass(frozen=True, slots=True)
class OperatingPoints:
    """Which probabilities are called present and which absent.

    Attributes:
        present_at: by finding, the probability at and above which it is present.
        absent_below: by finding, the probability below which it is absent.
        source: whose they are, in words.
        site: the site file's id; None where they are the bundle's own.
    """

    present_at: Mapping[str, float]
    absent_below: Mapping[str, float]
    source: str
    site: str | None

    @classmethod
    def of(cls, manifest: Manifest, site: Site | None) -> "OperatingPoints":
        """Return those of a site file, else a bundle's own."""
        if site is None:
            own = MappingProxyType(manifest.operating_points)
            return cls(own, own, "bundle", None)
        named = [(name, site.points[name]) for name in manifest.findings if name in site.points]
        return cls(
            {name: point.present_at for name, point in named if point.present_at is not None},
            {name: point.absent_below for name, point in named if point.absent_below is not None},
            site.in_words,
            site.id,
        )

    @property
    def findings(self) -> frozenset[str]:
        """Those that have an operating point."""
        return frozenset(self.present_at) | frozenset(self.absent_below)

    def decide(self, probabilities: Mapping[str, float]) -> dict[str, bool]:
        """Return by finding whether it is present; those of which nothing is said are omitted."""
        decided = {}
        for finding, probability in probabilities.items():
            if probability >= self.present_at.get(finding, 2.0):
                decided[finding] = True
            elif probability < self.absent_below.get(finding, -1.0):
                decided[finding] = False
        return decided

    def place(self, finding: str, probability: float) -> str:
        """Return in words how a probability lies to the finding's operating point."""
        high, low = self.present_at.get(finding), self.absent_below.get(finding)
        if high is not None and probability >= high:
            return f"at or above the operating point {high:.4f}"
        if low is not None and probability < low:
            return f"below the operating point {low:.4f}"
        if high is not None and low is not None:
            return f"undetermined between {low:.4f} and {high:.4f}"
        if high is not None:
            return f"undetermined below {high:.4f}"
        return "no operating point" if low is None else f"undetermined from {low:.4f} on"


def rate_name(rate: Rate) -> str:
    """Return a rate as people write it."""
    return rate.upper() if rate in ("ppv", "npv") else rate


def site_path(bundle: Path) -> Path:
    """Return where a bundle's site file lies, or would; a link to the bundle is followed."""
    resolved = bundle.resolve()
    return resolved.with_name(f"{resolved.name}{SITE_SUFFIX}")


def signature_path(site: Path) -> Path:
    """Return where a site file's signatures lie, or would."""
    return site.with_name(f"{site.name}.sig")


def read_site(bundle: Path, bundle_id: str, manifest: Manifest, trust: Trust | None) -> Site | None:
    """Return what lies beside a bundle; None where nothing does. See Bundle.read_site.

    Raises:
        BundleError, TrustError: see Bundle.read_site.
    """
    path = site_path(bundle)
    if not (path.exists() or path.is_symlink()):
        return None
    raw = _plain(path, MAX_SITE_BYTES, BundleError).read()
    if trust is not None:
        signed = signature_path(path)
        if not (signed.exists() or signed.is_symlink()):
            raise trust.refuse_unsigned(str(path))
        signatures = _plain(signed, MAX_SIGNATURE_BYTES, TrustError).read()
        trust.check_site(raw, signatures, str(path), str(signed))
    try:
        file = _SiteFile.model_validate_json(raw, strict=True)
    except ValidationError as err:
        raise BundleError(f"{path}: {describe(err)}. {_AGAIN}") from err
    # As it would be written, or a key could be there twice.
    if file.sha256 != file.site.id or file.site.to_json() != raw:
        raise BundleError(f"{path} was changed after it was written. {_AGAIN}")
    if file.site.bundle != bundle_id:
        raise BundleError(
            f"{path} is for the bundle {file.site.bundle[:12]}…, and {bundle} is {bundle_id[:12]}…: thresholds of one model "
            f"mean nothing to another. {_AGAIN}"
        )
    unknown = sorted({*file.site.points, *file.site.without} - set(manifest.findings))
    if unknown:
        raise BundleError(f"{path} names {name_some(unknown)}, which the bundle does not find. {_AGAIN}")
    return file.site


def _plain(path: Path, limit_bytes: int, error: type[BundleError] | type[TrustError]) -> PlainFile:
    return PlainFile(path=path, limit_bytes=limit_bytes, error=error, next_step=_AGAIN)
