"""EvaluationRequest -> Evaluation: read, score, compare with radiologists, and record the methods."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

import numpy as np

from chexnet_deploy.datasets.chestxray14 import ChestXray14
from chexnet_deploy.datasets.radiologist_labels import MAJORITY_FILE, READERS_FILE, ExpertLabels
from chexnet_deploy.errors import OnPhase, SpecError
from chexnet_deploy.evaluation.localize import BoxedMap
from chexnet_deploy.evaluation.machine import describe_machine
from chexnet_deploy.evaluation.methods import describe_methods
from chexnet_deploy.evaluation.radiologists import (
    NO_POSITIVE,
    choose_thresholds,
    compare_with_readers,
    read_thresholds,
    tuning_rows,
)
from chexnet_deploy.evaluation.records import Evaluation, ReaderComparison, Threshold
from chexnet_deploy.evaluation.request import EvaluationRequest
from chexnet_deploy.evaluation.scores import decision_values, evaluate_scores
from chexnet_deploy.evaluation.sources import Material, read_material, run_engine
from chexnet_deploy.files import sha256_hex
from chexnet_deploy.runtime.contract import read_contract
from chexnet_deploy.runtime.engine import find_engine, refuse_idle_contract


@dataclass(frozen=True, slots=True, eq=False)
class EvaluationRun:
    """An evaluation with the activation maps it was made from, for pictures."""

    evaluation: Evaluation
    maps: tuple[BoxedMap, ...]


def run_evaluation(request: EvaluationRequest, *, on_phase: OnPhase) -> EvaluationRun:
    """Run an evaluation request.

    Raises:
        ChexnetError: a file, the bundle or an image can't be used, or options don't fit the data.
    """
    # What is small is read first: a wrong file should not cost a run over thousands of images.
    experts = None if request.readers is None else ExpertLabels.open(request.readers)
    if request.engine is None:
        material = read_material(request)
        are_probabilities = material.labelled.kind != "score"
        given = _given_thresholds(request, material.labelled.findings, {}, are_probabilities=are_probabilities)
    else:
        contract = None if request.contract is None else read_contract(request.contract)
        engine = find_engine(request.engine, contract, trust=request.trust)
        refuse_idle_contract(request.contract, [engine])
        given = _given_thresholds(request, engine.findings, engine.operating_points, are_probabilities=True)
        if experts is not None and not given:
            raise SpecError(
                f"{request.engine} has no operating points, and readers say yes or no. Give --thresholds FILE, "
                f"chosen on other patients."
            )
        material = run_engine(engine, request, on_phase)
    words = None
    if given:
        named = request.thresholds or request.contract
        words = (
            "the bundle's own operating points, chosen on validation patients"
            if named is None
            else f"those of {named.name}, which doesn't say on whom they were chosen"
        )
    comparison = None
    if experts is not None:
        on_phase("reader study", 0, 1)
        comparison = _compare(request, material, experts, given, words)
        on_phase("reader study", 1, 1)
    evaluation = _record(request, material, given, words, comparison)
    return EvaluationRun(evaluation.model_copy(update={"methods": describe_methods(evaluation)}), material.maps)


def _record(
    request: EvaluationRequest,
    material: Material,
    thresholds: Sequence[Threshold],
    thresholds_from: str | None,
    comparison: ReaderComparison | None,
) -> Evaluation:
    labelled = material.labelled
    scored = evaluate_scores(labelled, {each.finding: each.probability for each in thresholds})
    return Evaluation(
        finished_utc=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        tools=describe_machine().packages,
        source=material.source,
        bundle_id=material.bundle_id,
        inputs_sha256={path.name: sha256_hex(path.read_bytes()) for path in _files(request, material)},
        kind=labelled.kind,
        data=material.data,
        n_images=len(labelled.names),
        n_patients=np.unique(labelled.patients).size,
        patients_note=material.patients_note,
        notes=material.notes,
        findings=scored.findings,
        mean_auroc=scored.mean_auroc,
        mean_auroc_interval=scored.mean_auroc_interval,
        n_counted=scored.n_counted,
        left_out=scored.left_out,
        undefined=scored.undefined,
        thresholds_from=thresholds_from,
        subgroups=scored.subgroups,
        readers=comparison,
        localization=material.localization,
        methods=(),
    )


def _given_thresholds(
    request: EvaluationRequest, findings: tuple[str, ...], own: Mapping[str, float], *, are_probabilities: bool
) -> tuple[Threshold, ...]:
    if request.thresholds is not None:
        return read_thresholds(request.thresholds, findings, are_probabilities=are_probabilities)
    return tuple(Threshold(finding=name, probability=own[name]) for name in findings if name in own)


def _compare(
    request: EvaluationRequest,
    material: Material,
    experts: ExpertLabels,
    given: tuple[Threshold, ...],
    words: str | None,
) -> ReaderComparison:
    """Compare with readers by the thresholds given, or by those of the largest F1 on other patients."""
    if words is not None:
        return compare_with_readers(material.labelled, experts, given, thresholds_from=words)
    assert request.data is not None  # EvaluationRequest checks it
    dataset = ChestXray14.open(request.data)
    everything = material.everything
    rows = tuning_rows(everything.patients, experts, dataset.listed_patients("test"))
    thresholds = choose_thresholds(decision_values(everything)[rows], everything.truth[rows], everything.findings)
    n_images, n_patients = int(rows.sum()), np.unique(everything.patients[rows]).size
    return compare_with_readers(
        material.labelled,
        experts,
        thresholds,
        thresholds_from=(
            f"those of the largest F1 on the labels of {n_images:,} predicted images of {n_patients:,} patients who "
            f"have no expert reads and are not in the official test list"
        ),
        why_none=NO_POSITIVE,
    )


def _files(request: EvaluationRequest, material: Material) -> tuple[Path, ...]:
    files = material.files if request.thresholds is None else (*material.files, request.thresholds)
    return files if request.readers is None else (*files, *(request.readers / n for n in (READERS_FILE, MAJORITY_FILE)))
