"""Entry points of `bench` and `evaluate`: measure, judge, and write report.json and a page into a new folder."""

import importlib
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from types import ModuleType
from typing import Literal

from chexnet_deploy.bundle import Bundle, Trust, find_reference
from chexnet_deploy.datasets.chestxray14 import ChestXray14, Split
from chexnet_deploy.datasets.labelled import LabelledImages
from chexnet_deploy.errors import OnPhase, SpecError, require
from chexnet_deploy.evaluation.attest import attest
from chexnet_deploy.evaluation.bench_report import BenchReport, write_predictions
from chexnet_deploy.evaluation.engines import Effort, run_bench
from chexnet_deploy.evaluation.records import Evaluation
from chexnet_deploy.evaluation.request import EvaluationRequest
from chexnet_deploy.evaluation.run import run_evaluation
from chexnet_deploy.evaluation.sources import choose_images, say_who_is_known
from chexnet_deploy.evaluation.spec import find_spec, read_spec
from chexnet_deploy.files import new_folder, sha256_of_file
from chexnet_deploy.runtime import Predictor, open_session
from chexnet_deploy.runtime.sessions.base import Provider


def bench(
    engine_paths: Sequence[Path],
    reference_path: Path | None,
    data_root: Path | None,
    split: Split,
    image_list: Path | None,
    spec: str | None,
    out: Path,
    *,
    effort: Effort,
    trust: Trust | None = None,
    threads: int | None,
    provider: Provider,
    with_html: bool,
    on_phase: OnPhase,
) -> BenchReport:
    """Measure bundles, write report.json, report.html, attestations and the logits into `out`, return the report.

    `image_list` narrows the split to the images it names. Every readable image is measured, also one that `predict` refuses by the
    model's scope or the content check.

    Raises:
        ChexnetError: a bundle, the data or the spec can't be used; or an engine refuses to run here.
    """
    pages = _open_pages("bench_page") if with_html else None
    if image_list is not None and data_root is None:
        raise SpecError("a list of images needs the data they are in. Give ChestX-ray14 by --data.")
    trust = None if trust is None else trust.without_pass()  # it is `bench` that gives one
    bundles = [Bundle.open(path, trust=trust) for path in engine_paths]
    reference = (
        find_reference(bundles[0], trust=trust) if reference_path is None else Bundle.open(reference_path, trust=trust)
    )
    spec_files = [find_spec(bundle.manifest.precision.value if spec is None else spec) for bundle in bundles]
    specs, specs_sha256 = [read_spec(str(file)) for file in spec_files], [sha256_of_file(file) for file in spec_files]
    images, data, patients_note = None, "no labelled images", ""
    if data_root is not None:
        radiographs, data = choose_images(ChestXray14.open(data_root), split, image_list)
        patients_note = say_who_is_known(reference, radiographs, split)
        images = LabelledImages.of(radiographs, reference.manifest.findings)
    # The folder is made first and shown last: a place that can't be written costs no measurement, and a report is whole.
    with new_folder(out) as partial:
        run = run_bench(
            list(zip(bundles, specs, strict=True)),
            reference,
            images,
            data=data,
            patients_note=patients_note,
            effort=effort,
            threads=threads,
            provider=provider,
            on_phase=on_phase,
        )
        (partial / "report.json").write_text(run.report.model_dump_json(indent=1) + "\n", encoding="utf-8")
        if images is not None:
            for name, logits in run.logits.items():
                write_predictions(partial / f"logits-{name}.csv", images, reference.manifest.findings, logits)
        for file, attestation in attest(run, bundles, reference, specs_sha256, on_phase).items():
            (partial / file).write_bytes(attestation.to_bytes())
        if pages is not None:
            session = open_session(bundles[-1], threads=threads, provider=provider)
            with Predictor(session, bundles[-1].manifest, checks=False) as predictor:
                pages.write_html(partial / "report.html", run, predictor)
    return run.report


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
