"""calibrate: a bundle and a site's labelled images -> operating points with a guarantee, in a site file beside the bundle.

The images are loaded, checked and run as `predict` does it, so what is guaranteed is of images that are answered; those that are
refused have no answer to be wrong. Each rate is of a new patient's one image, drawn by lot:

    sensitivity   among the patient's images that show the finding: it is called present
    specificity   among those that don't: it is called absent
    PPV           among all: where it is called present, it shows the finding
    NPV           among all: where it is called absent, it doesn't

A guarantee is of one rate of one finding by itself. metrics/guarantee.py has the method and its sources.
"""

import hashlib
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from chexnet_deploy.bundle.bundle import Bundle
from chexnet_deploy.bundle.signing.trust import Trust
from chexnet_deploy.bundle.site import Evidence, Rate, Site, SitePoint, rate_name, signature_path, site_path
from chexnet_deploy.datasets.chestxray14 import Split
from chexnet_deploy.datasets.data_set import open_data
from chexnet_deploy.datasets.labelled import LabelledImages
from chexnet_deploy.errors import BundleError, DatasetError, ImageError, OnPhase, SpecError
from chexnet_deploy.evaluation.machine import describe_machine
from chexnet_deploy.evaluation.sources import choose_images, say_who_is_known
from chexnet_deploy.files import sha256_of_file, write_file
from chexnet_deploy.metrics.guarantee import (
    Cut,
    Shortfall,
    confirmed_above,
    draw_one_each,
    fewest_patients,
    reached_by,
)
from chexnet_deploy.runtime.predictor import Predictor
from chexnet_deploy.runtime.sessions.base import Provider
from chexnet_deploy.runtime.sessions.open import open_session, resolve_provider
from chexnet_deploy.runtime.streaming import choose_flow, usable_cores

_RIGHT: Final[Mapping[Rate, bool]] = {"sensitivity": True, "specificity": False, "ppv": True, "npv": False}
"""Whether the rate's right answer is that the finding is there."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SiteRequest:
    """What is to be guaranteed of which bundle, on whose images.

    Attributes:
        bundle: its folder; the site file goes beside it.
        data: as open_data takes it.
        split: whose images; never train.
        images: list that narrows them further.
        rates: sensitivity alone, specificity alone, or PPV, NPV or both.
        confidence: that each rate holds for new patients.
        trust: what the bundle must show to be opened.

    Raises:
        SpecError: rates that don't go together, or a number that means nothing.
    """

    bundle: Path
    data: Path
    split: Split = "test"
    images: Path | None = None
    rates: Mapping[Rate, float]
    confidence: float = 0.95
    threads: int | None = None
    provider: Provider = "auto"
    trust: Trust | None = None

    def __post_init__(self) -> None:
        asked = set(self.rates)
        if not asked or (len(asked) > 1 and asked != {"ppv", "npv"}):
            found = " and ".join(f"--{rate}" for rate in self.rates) or "no rate"
            raise SpecError(
                f"found {found}; needed --sensitivity, --specificity, or --ppv and --npv, which have a threshold each. Give one."
            )
        for name, value in (*self.rates.items(), ("confidence", self.confidence)):
            if not 0.0 < value < 1.0:
                raise SpecError(f"--{name} {value}: needed a share between 0 and 1, such as 0.95.")
        if self.split == "train":
            raise SpecError(
                "the model was fitted to training patients, and would be surer of them than of new ones. Give --split val or test."
            )


def calibrate(request: SiteRequest, *, on_phase: OnPhase) -> Site:
    """Choose operating points, write the site file and return what it says.

    Raises:
        BundleError: the bundle can't be used, a site file is there already, or it can't be written.
        DatasetError: the data can't be used, a patient was trained on, or no finding can be guaranteed anything, with how
            many more patients it takes.
        ChexnetError: see Bundle.open and open_session.
    """
    bundle = Bundle.open(request.bundle, trust=request.trust)
    path = site_path(bundle.path)
    for there in (path, signature_path(path)):
        if there.exists() or there.is_symlink():
            raise BundleError(f"{there} is there already. Delete it to calibrate again.")
    dataset = open_data(request.data)
    if dataset.patients_unknown:
        raise DatasetError(
            f"{dataset.table}: found {dataset.patients_unknown}; needed whose they are, as the rate is promised for new patients. "
            f"Next: name the patients' column, or, where each image is another patient's, the images' column as patient."
        )
    labelled, words = choose_images(dataset, request.split, request.images)
    images = labelled.for_findings(labelled.shared_with(bundle.manifest.findings))
    note = say_who_is_known([bundle], labelled, request.split)
    _refuse_hopeless(images, request)
    probabilities, backend = _predict(bundle, images, request, on_phase)
    points = {}
    without = {name: "the data don't label it" for name in bundle.manifest.findings if name not in images.findings}
    is_answered = np.isfinite(probabilities).all(axis=1)
    lots = np.array([_lot(name) for name in images.names], np.uint64)
    for c, finding in enumerate(images.findings):
        known = np.flatnonzero(is_answered & images.labelled[:, c])
        found = choose_point(
            probabilities[known, c], images.truth[known, c], images.patients[known], lots[known], request
        )
        if isinstance(found, SitePoint):
            points[finding] = found
        else:
            without[finding] = found
    if not points:
        raise DatasetError(_say_none(without))
    site = Site(
        bundle=bundle.id,
        asked=dict(request.rates),
        confidence=request.confidence,
        points=points,
        without=without,
        data=words,
        patients_note=(note,),
        n_images=int(is_answered.sum()),
        n_patients=np.unique(images.patients[is_answered]).size,
        n_refused=int((~is_answered).sum()),
        inputs_sha256={file.name: sha256_of_file(file) for file in (dataset.table, request.images) if file is not None},
        backend=backend,
        made_utc=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        tools=describe_machine().packages,
    )
    try:
        write_file(path, site.to_json())
    except OSError as err:
        raise BundleError(f"{path} can't be written: {err.strerror}. Check the disk and its permissions.") from err
    return site


def choose_point(
    probabilities: NDArray[np.float32],
    truth: NDArray[np.bool_],
    patients: NDArray[np.int64],
    lots: NDArray[np.uint64],
    request: SiteRequest,
) -> SitePoint | str:
    """Return one finding's operating point, or why there is none.

    Args:
        probabilities: [N] of labelled images that were answered.
        truth: [N] True where the finding is present.
        patients: [N].
        lots: [N] see draw_one_each.
        request: the rates.
    """
    found = {rate: _cut(rate, probabilities, truth, patients, lots, request) for rate in request.rates}
    high = low = None
    guaranteed, reasons = dict[Rate, Evidence](), dict[Rate, str]()
    for rate, cut in found.items():
        if isinstance(cut, str):
            reasons[rate] = cut
            continue
        guaranteed[rate] = Evidence(n_patients=cut.n_patients, n_wrong=cut.n_wrong)
        high = high if rate == "npv" else cut.threshold
        low = low if rate == "ppv" else cut.threshold
    if not guaranteed:
        return "; ".join(reasons.values())
    if high is not None and low is not None:
        low = min(low, high)  # where both would do, it is present
    is_present = probabilities >= (2.0 if high is None else high)
    is_absent = probabilities < (-1.0 if low is None else low)
    return SitePoint(
        present_at=high,
        absent_below=low,
        guaranteed=guaranteed,
        not_guaranteed=reasons,
        sensitivity=_share(is_present[truth]),
        specificity=_share(is_absent[~truth]),
        undetermined=_share(~is_present & ~is_absent) or 0.0,
    )


def _cut(
    rate: Rate,
    probabilities: NDArray[np.float32],
    truth: NDArray[np.bool_],
    patients: NDArray[np.int64],
    lots: NDArray[np.uint64],
    request: SiteRequest,
) -> Cut | str:
    """Return the threshold of one rate, to be compared as Prediction does: present at and above, absent below."""
    target, is_of_class = request.rates[rate], rate in ("sensitivity", "specificity")
    rows = np.flatnonzero(truth == _RIGHT[rate]) if is_of_class else np.arange(truth.size)
    rows = rows[draw_one_each(patients[rows], lots[rows])]
    # What is right lies high, so for specificity and NPV the scale is turned over.
    scores = probabilities[rows] if _RIGHT[rate] else -probabilities[rows]
    if is_of_class:
        found = reached_by(scores, target, request.confidence)
    else:
        found = confirmed_above(scores, truth[rows] == _RIGHT[rate], target, request.confidence)
    if isinstance(found, Shortfall):
        return _say_short(rate, target, found)
    # Turned back, "reached" is at or below, and "above" is below: the next float32 makes the one into the other.
    edge = np.float32(found.threshold if _RIGHT[rate] else -found.threshold)
    if rate in ("specificity", "ppv"):
        edge = np.nextafter(edge, np.float32(np.inf))
    threshold = float(np.clip(edge, 0.0, 1.0))
    if rate == "specificity" and edge > 1.0:
        return "specificity: too many images without the finding have the probability 1; no threshold parts them"
    return Cut(threshold, found.n_patients, found.n_wrong)


def _predict(
    bundle: Bundle, images: LabelledImages, request: SiteRequest, on_phase: OnPhase
) -> tuple[NDArray[np.float32], str]:
    """Return [N, C] probabilities of the findings that are labelled, NaN for images that are refused, and what ran the model."""
    manifest = bundle.manifest
    threads = request.threads or 1
    flow = choose_flow(manifest, threads=threads, provider=request.provider, cores=usable_cores())
    session = open_session(bundle, threads=threads, provider=request.provider)
    probabilities = np.full(images.truth.shape, np.nan, np.float32)
    with (
        Predictor(session, manifest, flow) as predictor,
        closing(predictor.predict_stream(images.paths)) as answers,
    ):
        for place, done in enumerate(answers):
            if not isinstance(done.answer, ImageError):
                probabilities[place] = [done.answer.probabilities[finding] for finding in images.findings]
            on_phase("predict", place + 1, len(images.paths))
    return probabilities, resolve_provider(request.provider) if manifest.target is None else manifest.target.backend


def _refuse_hopeless(images: LabelledImages, request: SiteRequest) -> None:
    """Refuse before hours of inference what no scores could help: too few patients for every finding."""
    for rate, target in request.rates.items():
        needed = fewest_patients(target, request.confidence)
        counts = {}
        for c, finding in enumerate(images.findings):
            rows = images.labelled[:, c]
            if rate in ("sensitivity", "specificity"):
                rows = rows & (images.truth[:, c] == _RIGHT[rate])
            counts[finding] = np.unique(images.patients[rows]).size
        if max(counts.values()) >= needed:
            return
    short = {
        finding: _say_short(rate, target, Shortfall(count, needed - count, is_certain=True))
        for finding, count in counts.items()
    }
    raise DatasetError(_say_none(short))


def _say_short(rate: Rate, target: float, short: Shortfall) -> str:
    of = {"sensitivity": "with the finding", "specificity": "without the finding", "ppv": "", "npv": ""}[rate]
    who = f"patients {of}".strip()
    if short.is_certain:
        needed = short.n_patients + (short.n_more or 0)
        return f"{rate_name(rate)} {target:g}: {short.n_patients:,} {who}, {needed:,} are the fewest; {short.n_more:,} more"
    if short.n_more is None:
        return f"{rate_name(rate)} {target:g}: at no threshold do these {short.n_patients:,} patients reach it; ask for less"
    return f"{rate_name(rate)} {target:g}: {short.n_patients:,} patients don't show it; about {short.n_more:,} more like them would"


def _say_none(without: Mapping[str, str]) -> str:
    reasons = "; ".join(f"{finding}, {reason}" for finding, reason in list(without.items())[:3])
    more = f"; and {len(without) - 3} more findings" if len(without) > 3 else ""
    return f"found no finding that these patients show it for: {reasons}{more}. Add patients, or ask for less."


def _share(counted: NDArray[np.bool_]) -> float | None:
    return float(counted.mean()) if counted.size else None


def _lot(name: str) -> int:
    """Return a number that has to do with an image's name alone, so that nobody can draw again until it suits."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")
