"""Results of an evaluation: frozen records, the schema of report.json; the page shows nothing else.

A figure that is undefined is None and named with its reason in the `undefined` beside it.
"""

from typing import Literal, TypeAlias

from chexnet_deploy.datasets.predictions import ScoreKind
from chexnet_deploy.inputs import Record
from chexnet_deploy.metrics.localization import LocalizationReport
from chexnet_deploy.metrics.radiologists import ReaderStudy

Interval: TypeAlias = tuple[float, float]
"""The two ends of a 95 % confidence interval."""


class Share(Record):
    """A share of images; None where undefined.

    Attributes:
        interval: clustered by patient; None with fewer than two patients.
        n_images: of which it is a share.
        n_patients: whose images they are.
    """

    value: float | None
    interval: Interval | None
    n_images: int
    n_patients: int


class OperatingPoint(Record):
    """Decisions of one finding: at and above the threshold it is called."""

    threshold: float
    sensitivity: Share
    specificity: Share


class Curve(Record):
    """An ROC curve at false-positive rates 0, 0.01, ..., 1.

    Attributes:
        sensitivity: at those rates.
        low: of the pointwise 95 % band; None where too many resamples lacked a class.
        high: likewise.
        undefined_share: of the resamples, left out of the band.
    """

    sensitivity: tuple[float, ...]
    low: tuple[float, ...] | None
    high: tuple[float, ...] | None
    undefined_share: float


class ReliabilityPoint(Record):
    """One bin of a reliability diagram."""

    mean_probability: float
    observed: float
    n_images: int


class FindingScore(Record):
    """One finding.

    Attributes:
        n_positive: images that show it.
        n_positive_patients: patients with such an image.
        n_negative_patients: patients with an image without it.
        auroc_interval: clustered by patient.
        operating_point: None where no threshold is known.
        undefined: figure -> why it is None.
    """

    finding: str
    n_positive: int
    n_positive_patients: int
    n_negative_patients: int
    auroc: float | None
    auroc_interval: Interval | None
    auprc: float | None
    brier: float | None
    ece: float | None
    operating_point: OperatingPoint | None
    roc: Curve | None
    reliability: tuple[ReliabilityPoint, ...]
    undefined: dict[str, str]


class SubgroupFinding(Record):
    """One finding among the images of a subgroup; without an AUROC, `why_not` says why."""

    finding: str
    n_positive: int
    n_positive_patients: int
    auroc: float | None
    auroc_interval: Interval | None
    why_not: str | None


class Subgroup(Record):
    """Some of the images, by what the labels say of their patients.

    Attributes:
        name: what they have in common, e.g. "sex F"; the images of which the labels don't say it are a group too.
    """

    name: str
    n_images: int
    n_patients: int
    findings: tuple[SubgroupFinding, ...]


class Threshold(Record):
    """Where a finding counts as called.

    Attributes:
        probability: at and above it; a score, where the scores are no probabilities.
        f1: on the images it was chosen on; None where it was given.
        n_positive: of those images; None likewise.
    """

    finding: str
    probability: float
    f1: float | None = None
    n_positive: int | None = None


class RocPoint(Record):
    """A rater's decisions in the ROC plane; None where the label has one class only."""

    rater: str
    false_positive_rate: float | None
    sensitivity: float | None


class ReaderRoc(Record):
    """One finding's curve against the readers' majority, with the raters who had no vote in it as points.

    Attributes:
        n_positive: images that the majority calls positive.
        false_positive_rates: of the model's curve at every threshold, from 0 to 1.
        sensitivities: likewise; both empty where the majority has one class only.
        points: of the readers who had no vote, and of the model at its threshold.
    """

    finding: str
    n_positive: int
    auroc: float | None
    auroc_interval: Interval | None
    false_positive_rates: tuple[float, ...]
    sensitivities: tuple[float, ...]
    points: tuple[RocPoint, ...]


class ReaderComparison(Record):
    """The model beside radiologists.

    Attributes:
        n_read: images that readers read.
        n_images: of them, those that were scored too; the studies are of these alone.
        n_patients: whose images those are.
        thresholds_from: how they were chosen, in words.
        left_out: finding -> why it is in no study.
        majority_readers: whose majority the label of the third study and of `roc` is.
        studies: paper's protocol, against readers only, against the majority.
    """

    n_read: int
    n_images: int
    n_patients: int
    thresholds_from: str
    thresholds: tuple[Threshold, ...]
    left_out: dict[str, str]
    majority_readers: tuple[str, ...]
    studies: tuple[ReaderStudy, ...]
    roc: tuple[ReaderRoc, ...]


class LocalizedImage(Record):
    """One map against the boxes of its finding in one image; figures as in metrics.localization.MapScore."""

    image: str
    finding: str
    probability: float
    pointing: float
    iou: tuple[float, ...]
    iobb: tuple[float, ...]


class Localization(Record):
    """Activation maps against a radiologist's boxes.

    Attributes:
        n_images: evaluated images that have a box.
        n_left_out: others that have one, but are smaller than those, so that nothing says where it lies.
        height_px: of the images that the boxes are drawn on.
        width_px: likewise.
        summary: by finding.
        images: every map that was scored.
    """

    n_images: int
    n_left_out: int
    height_px: int
    width_px: int
    summary: LocalizationReport
    images: tuple[LocalizedImage, ...]


class Evaluation(Record):
    """Scores on labelled images.

    Attributes:
        source: what made the scores, in words.
        bundle_id: None where they came from a CSV.
        inputs_sha256: name of each file that was read beside images -> its hash.
        kind: of the scores; a logit's probability is its sigmoid.
        data: what the images are, in words.
        patients_note: sentences on which patients these are, and on their overlap with the training patients.
        notes: sentences on what was left aside.
        mean_auroc: over the findings whose AUROC is defined, `n_counted` of them.
        left_out: finding -> why it is not in the mean.
        undefined: figure -> why it is None.
        thresholds_from: where the operating points come from, in words; None without any.
        methods: paragraphs on what was done, with citations.
    """

    schema_version: Literal[2] = 2
    finished_utc: str
    tools: dict[str, str]
    source: str
    bundle_id: str | None
    inputs_sha256: dict[str, str]
    kind: ScoreKind
    data: str
    n_images: int
    n_patients: int
    patients_note: tuple[str, ...]
    notes: tuple[str, ...]
    findings: tuple[FindingScore, ...]
    mean_auroc: float | None
    mean_auroc_interval: Interval | None
    n_counted: int
    left_out: dict[str, str]
    undefined: dict[str, str]
    thresholds_from: str | None
    subgroups: tuple[Subgroup, ...]
    readers: ReaderComparison | None
    localization: Localization | None
    methods: tuple[str, ...]
