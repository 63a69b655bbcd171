"""Entry points of `bench` and `evaluate`: measure, judge, and write report.json and a page into a new folder."""

import importlib
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from types import ModuleType
from typing import Literal

from chexnet_deploy.bundle import Bundle, Trust, find_reference
from chexnet_deploy.datasets.chestxray14 import Split
from chexnet_deploy.datasets.data_set import open_data
from chexnet_deploy.errors import OnPhase, SpecError, require
from chexnet_deploy.evaluation.attest import attest
from chexnet_deploy.evaluation.bench_report import BenchReport, write_predictions
from chexnet_deploy.evaluation.engines import Effort, MeasureDicom, run_bench
from chexnet_deploy.evaluation.records import Evaluation
from chexnet_deploy.evaluation.request import EvaluationRequest
from chexnet_deploy.evaluation.run import run_evaluation
from chexnet_deploy.evaluation.sources import choose_images, say_who_is_known
from chexnet_deploy.evaluation.spec import find_spec, read_spec
from chexnet_deploy.files import new_folder, sha256_of_file
from chexnet_deploy.runtime.contract import read_contract
from chexnet_deploy.runtime.engine import Engine, find_engine, refuse_idle_contract
from chexnet_deploy.runtime.sessions.base import Provider


def bench(
    engine_places: Sequence[Path | str],
    reference_place: Path | str | None,
    data_root: Path | None,
    split: Split,
    image_list: Path | None,
    spec: str | None,
    out: Path,
    *,
    effort: Effort,
    measure_dicom: MeasureDicom | None = None,
    contract: Path | None = None,
    reference_contract: Path | None = None,
    trust: Trust | None = None,
    threads: int | None,
    provider: Provider,
    with_html: bool,
    on_phase: OnPhase,
) -> BenchReport:
    """Measure engines, write report.json, report.html, bundles' attestations and the logits into `out`, return the report.

    An engine is a bundle, an ONNX file or an endpoint; `contract` describes those that are no bundle, the reference too where
    it has no `reference_contract`. `image_list` narrows the split to the images it names. Every readable image is measured, also
    one that `predict` refuses by the model's scope or the content check.

    Raises:
        ChexnetError: an engine, its contract, the data or the spec can't be used; or an engine refuses to run here.
    """
    pages = _open_pages("bench_page") if with_html else None
    if image_list is not None and data_root is None:
        raise SpecError("a list of images needs the data they are in. Give them by --data.")
    trust = None if trust is None else trust.without_pass()  # it is `bench` that gives one
    contracts = [None if path is None else read_contract(path) for path in (contract, reference_contract)]
    engines = [find_engine(place, contracts[0], trust=trust) for place in engine_places]
    if reference_place is None:
        reference: Engine = find_reference(_first_bundle(engines), trust=trust)
    else:
        reference = find_engine(reference_place, contracts[1] or contracts[0], trust=trust)
    refuse_idle_contract(contract, [*engines, *([] if reference_contract else [reference])])
    refuse_idle_contract(reference_contract, [reference])
    spec_files = [_find_spec(spec, engine) for engine in engines]
    specs, specs_sha256 = [read_spec(str(file)) for file in spec_files], [sha256_of_file(file) for file in spec_files]
    images, data, patients_note = None, "no labelled images", ""
    if data_root is not None:
        images, data = choose_images(open_data(data_root), split, image_list)
        patients_note = say_who_is_known([reference, *engines], images, split)
    # The folder is made first and shown last: a place that can't be written costs no measurement, and a report is whole.
    with new_folder(out) as partial:
        run = run_bench(
            list(zip(engines, specs, strict=True)),
            reference,
            images,
            data=data,
            patients_note=patients_note,
            effort=effort,
            measure_dicom=measure_dicom,
            threads=threads,
            provider=provider,
            on_phase=on_phase,
        )
        (partial / "report.json").write_text(run.report.model_dump_json(indent=1) + "\n", encoding="utf-8")
        if run.images is not None:
            for name, logits in run.logits.items():
                write_predictions(partial / f"logits-{name}.csv", run.images, run.report.findings, logits)
        if split != "train":  # on patients whom a model knows nothing is shown of others
            for file, attestation in attest(run, engines, reference, specs_sha256, on_phase).items():
                (partial / file).write_bytes(attestation.to_bytes())
        if pages is not None:
            pages.write_html(partial / "report.html", run)
    return run.report


def _first_bundle(engines: Sequence[Engine]) -> Bundle:
    if isinstance(engines[0], Bundle):
        return engines[0]
    raise SpecError(
        f"found no --reference; {engines[0].place} is no bundle, and does not say what it is to be compared with. Give it."
    )


def _find_spec(spec: str | None, engine: Engine) -> Path:
    if spec is not None:
        return find_spec(spec)
    if isinstance(engine, Bundle):
        return find_spec(engine.manifest.precision.value)
    raise SpecError(
        f"found no --spec; {engine.place} is no bundle, and does not say what it must pass. Give it, e.g. int8."
    )


def evaluate(request: EvaluationRequest, out: Path | None, *, with_html: bool, on_phase: OnPhase) -> Evaluation:
    """Evaluate a bundle or predictions; write report.json and report.html into `out` where one is given.

    Every readable image is measured, also one that `predict` refuses by the model's scope or the content check.

    Raises:
        ChexnetError: a file, the bundle or an image can't be used, or the options don't fit the data.
    """
    pages = _open_pages("evaluation_page") if out is not None and with_html else None
    with ExitStack() as stack:
        partial = None if out is None else stack.enter_context(new_folder(out))
        run = run_evaluation(request, on_phase=on_phase)
        if partial is not None:
            (partial / "report.json").write_text(run.evaluation.model_dump_json(indent=1) + "\n", encoding="utf-8")
        if partial is not None and pages is not None:
            on_phase("page", 0, 1)
            pages.write_html(partial / "report.html", run)
            on_phase("page", 1, 1)
    return run.evaluation


def _open_pages(name: Literal["bench_page", "evaluation_page"]) -> ModuleType:
    with require("report", so="no HTML can be made", instead="give --no-html."):
        return importlib.import_module(f"chexnet_deploy.evaluation.pages.{name}")
