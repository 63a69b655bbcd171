"""A model card, and the dossier of a change between two bundles, of what sealed files say and of nothing else.

The dossier has the three parts of a predetermined change control plan (FDA, Marketing Submission Recommendations for a
Predetermined Change Control Plan for AI-Enabled Device Software Functions, December 2024, section V): description of
modifications, modification protocol, impact assessment. Nothing is measured here, and there is no clock: the same files give
the same bytes.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from chexnet_deploy.bundle.bundle import Bundle
from chexnet_deploy.bundle.manifest import MANIFEST
from chexnet_deploy.bundle.signing.attestation import ATTESTATION, Attestation
from chexnet_deploy.bundle.site import Site
from chexnet_deploy.errors import BundleError
from chexnet_deploy.evaluation.spec import SPEC_FOLDERS, EngineSpec, read_spec
from chexnet_deploy.files import sha256_hex, sha256_of_file
from chexnet_deploy.images.scope import ScopePolicy

Row = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Inputs:
    """What is known of one bundle; the names of its files stand beside each value that is from them."""

    bundle: Bundle
    attestation: Attestation | None
    site: Site | None
    spec: EngineSpec | None
    sha256: dict[str, str]

    @classmethod
    def read(cls, bundle: Bundle) -> "_Inputs":
        attested, site = bundle.read_attestation(), bundle.read_site()
        sha256, attestation, spec = {MANIFEST: bundle.id}, None, None
        if site is not None:
            sha256["site file"] = sha256_hex(site.to_json())  # the file's own bytes, or it would have been refused
        if attested is not None:
            attestation, sha256[ATTESTATION] = attested
            spec_file = _find_by_hash(attestation.spec_sha256)
            if spec_file is not None:
                spec, sha256["spec"] = read_spec(str(spec_file)), attestation.spec_sha256
        return cls(bundle, attestation, site, spec, sha256)

    def source(self, name: str) -> str:
        return f"{name} `{self.sha256[name][:12]}`"

    @property
    def title(self) -> str:
        release = self.bundle.manifest.release
        return f"{'no release' if release is None else release}, {self.facts()['precision']}, `{self.bundle.id[:12]}`"

    def facts(self) -> dict[str, str]:
        """What the manifest says, in words; what a dossier compares."""
        manifest = self.bundle.manifest
        calibration, trained_on, target = manifest.calibration, manifest.trained_on, manifest.target
        scope = manifest.scope or ScopePolicy()
        return {
            "release": "none" if manifest.release is None else str(manifest.release),
            "precision": manifest.precision.value if calibration is None else f"int8, {manifest.dialect}",
            "findings": f"{len(manifest.findings)}: {', '.join(manifest.findings)}",
            "model file": f"`{self.bundle.model_sha256}`",
            "checkpoint": f"`{manifest.checkpoint_sha256}`",
            "made of the bundles": ", ".join(f"`{each[:12]}`" for each in manifest.ancestors) or "none",
            "preprocessing": _words(manifest.preprocessing.model_dump()),
            "calibration": "none"
            if calibration is None
            else f"{calibration.n_images} images (`{calibration.list_sha256[:12]}`), {calibration.estimator}",
            "convolutions kept in floating point": str(len(manifest.float_convolutions)),
            "largest logit error on the known answers": _number(manifest.probe_max_abs_logit_error),
            "trained on": "unknown patients"
            if trained_on is None
            else f"{trained_on.n_patients:,} patients (`{trained_on.sha256[:12]}`)",
            "scope": f"{'the default: ' if manifest.scope is None else ''}{_words(scope.model_dump())}",
            "built for": "any machine" if target is None else _words(target.model_dump()),
            "tools": _words(manifest.tools),
        }

    def points(self) -> Iterator[Row]:
        """Finding, operating point, source."""
        if self.site is None:
            for finding, point in self.bundle.operating_points.items():
                yield finding, f"present from {_number(point)}", self.source(MANIFEST)
            return
        for finding, at_site in self.site.points.items():
            parts = {"absent below": at_site.absent_below, "present from": at_site.present_at}
            words = ", ".join(f"{what} {_number(value)}" for what, value in parts.items() if value is not None)
            yield finding, words, self.source("site file")
        for finding, reason in self.site.without.items():
            yield finding, f"none: {reason}", self.source("site file")

    def checks(self) -> Iterator[Row]:
        """What was measured before the bundle was kept, value, limit, source."""
        for check in self.bundle.manifest.checks:
            yield check.name, _number(check.value), _number(check.limit), self.source(MANIFEST)

    def measured(self) -> Iterator[Row]:
        """What `bench` found, value, source."""
        said = self.attestation
        if said is None:
            yield "verdict", "no attestation lies in the bundle: nothing was measured on labelled images", "-"
            return
        runs_on = said.runs_on
        for what, value in {
            "verdict": said.summary,
            "images, patients": f"{said.n_images:,}, {said.n_patients:,}",
            "data": "none" if said.data_sha256 is None else f"`{said.data_sha256}`",
            "beside the bundle": f"`{said.reference_id}`",
            "ran on": f"{runs_on.processor}, {runs_on.backend}, driver {runs_on.driver or 'none'}, {runs_on.platform}",
            "finished": said.finished_utc,
            "tools": _words(said.tools),
        }.items():
            yield what, value, self.source(ATTESTATION)

    def protocol(self) -> Iterator[Row]:
        """What had to be passed, limit, source."""
        if self.attestation is None:
            return
        if self.spec is None:
            yield "spec", f"`{self.attestation.spec_sha256}`, which is none of this package's", self.source(ATTESTATION)
            return
        for name, limit in self.spec.gate.model_dump().items():
            words = "measured, not gated" if limit is None else _words(limit)
            yield name.replace("_", " "), words, self.source("spec")


def write_card(bundle: Bundle, since: Bundle | None = None) -> str:
    """Return a model card in Markdown; with `since`, followed by the dossier of the change from it.

    Args:
        bundle: opened, with trust where its signatures are to count.
        since: the bundle that it replaces, likewise.

    Raises:
        BundleError: `since` is the same bundle, or no older release of its line; or a site file is damaged.
        TrustError: an attestation is of another bundle, changed, or not signed as trust asks.
    """
    after = _Inputs.read(bundle)
    lines = [
        f"# Model card: {after.title}\n",
        "Made of the files listed here and of nothing else. Beside each value stands the file that it is from, with the first 12 "
        f"digits of its SHA-256. Signatures: {_signers(bundle)}.\n",
        *_table(("file", "SHA-256"), after.sha256.items()),
        "## Model, intended use and training data\n",
        *_table(("what", "value", "from"), [(*fact, after.source(MANIFEST)) for fact in after.facts().items()]),
        "Not a medical device. What is out of scope by its DICOM header is refused; a PNG or an array says nothing of itself.\n",
        "## Operating points\n",
        *_table(("finding", "decision", "from"), after.points()),
        "## Checks before the bundle was kept\n",
        *_table(("check", "value", "limit", "from"), after.checks()),
        "## Measured on labelled images\n",
        *_table(("what", "value", "from"), after.measured()),
        "These files say nothing of subgroups, of other hospitals' patients, or of what readers do with the answers.\n",
    ]
    if since is not None:
        lines += _dossier(_Inputs.read(since), after)
    return "\n".join(lines)


def _dossier(before: _Inputs, after: _Inputs) -> list[str]:
    old, new = before.bundle.manifest.release, after.bundle.manifest.release
    if before.bundle.id == after.bundle.id:
        raise BundleError(
            f"found the bundle {after.bundle.id[:12]}… twice, needed another by --since. Give the older one."
        )
    if old is not None and new is not None and (old.line != new.line or old.number > new.number):
        raise BundleError(f"--since is {old}, needed an older release of {new.line} than {new}. Give that one.")
    facts = [(what, value, after.facts()[what]) for what, value in before.facts().items()]
    sources = (before.source(MANIFEST), after.source(MANIFEST))
    same = ", ".join(what for what, value, now in facts if value == now)
    return [
        f"# Change dossier: from {before.title} to {after.title}\n",
        f"Signatures of the bundle before: {_signers(before.bundle)}.\n",
        *_table(("file of the bundle before", "SHA-256"), before.sha256.items()),
        "## Description of modifications\n",
        *_table(
            ("what", "before", "after", "from"),
            [(*fact, f"{sources[0]}, {sources[1]}") for fact in facts if fact[1] != fact[2]],
        ),
        f"Unchanged: {same or 'nothing'}.\n",
        "## Modification protocol\n",
        "A bundle is kept only within the limits of its checks, below. `bench` then decides by a spec written before: each "
        "finding's AUROC may lose less than its margin, with 95 % confidence clustered by patient, and every limit holds.\n",
        *_table(("what must hold, after", "limit", "from"), after.protocol()),
        *_table(("what must hold, before", "limit", "from"), before.protocol()),
        f"{_comparable(before.attestation, after.attestation)}\n",
        "## Impact assessment\n",
        *_table(("what", "before", "after", "from"), _beside(before, after, "measured")),
        *_table(("check", "before", "after", "from"), _beside(before, after, "checks")),
        *_table(("decision on", "before", "after", "from"), _beside(before, after, "points")),
    ]


def _beside(before: _Inputs, after: _Inputs, what: str) -> Iterator[Row]:
    """Yield the rows of both, by what they are about."""
    both = [{row[0]: (row[1], row[-1]) for row in getattr(inputs, what)()} for inputs in (before, after)]
    for name in dict.fromkeys([*both[0], *both[1]]):
        (old, old_from), (new, new_from) = (rows.get(name, ("-", "-")) for rows in both)
        yield name, old, new, f"{old_from}, {new_from}"


def _comparable(before: Attestation | None, after: Attestation | None) -> str:
    if before is None or after is None:
        return "Not both bundles hold an attestation, so no measured result of one stands beside one of the other."
    differ = [
        words
        for words, name in (("data", "data_sha256"), ("spec", "spec_sha256"), ("machine", "runs_on"))
        if getattr(before, name) != getattr(after, name)
    ]
    if not differ:
        return "Both were measured on the same data, by the same spec, on the same kind of machine."
    return (
        f"The two were measured with another {' and another '.join(differ)}: their results are not of one experiment."
    )


def _signers(bundle: Bundle) -> str:
    return f"by {', '.join(bundle.signers)}" if bundle.signers else "not checked, as no trust file was given"


def _find_by_hash(sha256: str) -> Path | None:
    files = (file for folder in SPEC_FOLDERS for file in sorted(folder.glob("*.toml")))
    return next((file for file in files if sha256_of_file(file) == sha256), None)


def _words(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_words(each)}" for name, each in value.items())
    if isinstance(value, list | tuple):
        return " ".join(map(_words, value))
    return _number(value) if isinstance(value, float) else str(value)


def _number(value: float) -> str:
    return f"{value:.6g}"


def _table(header: Sequence[str], rows: Iterable[Row]) -> list[str]:
    """Return a table's lines; none where it has no rows. What a file says stays text, whatever it holds."""
    cells = [[" ".join(cell.replace("|", "\\|").replace("<", "&lt;").split()) for cell in row] for row in rows]
    lines = [f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *cells)]
    return [*lines, ""] if cells else []
