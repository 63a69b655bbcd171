"""What each command does, in one function a command: rooms put together, nothing computed here.

The command line, the demo and the benchmarks call these.
"""

import importlib
import threading
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from datetime import datetime
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Literal, TypeAlias, get_args

from PIL import Image

from chexnet_deploy.bench import BenchReport, Effort, find_reference, run_bench, write_predictions
from chexnet_deploy.bundle import Bundle
from chexnet_deploy.chestxray14 import ChestXray14, Split
from chexnet_deploy.errors import (
    BundleError,
    CalibrationError,
    ImageError,
    MissingPackageError,
    SpecError,
)
from chexnet_deploy.evaluation.records import Evaluation
from chexnet_deploy.evaluation.request import EvaluationRequest
from chexnet_deploy.evaluation.run import run_evaluation
from chexnet_deploy.evaluation.sources import choose_images, say_who_is_known
from chexnet_deploy.files import new_directory, write_file
from chexnet_deploy.image_files import ImageFiles
from chexnet_deploy.manifest import Dialect, Precision
from chexnet_deploy.phases import OnPhase
from chexnet_deploy.predictor import Prediction, Predictor, draw_cam
from chexnet_deploy.results import open_table
from chexnet_deploy.scope import ScopePolicy
from chexnet_deploy.scoring import LabelledImages
from chexnet_deploy.sessions import Provider, resolve_provider
from chexnet_deploy.sessions.driver import open_driver
from chexnet_deploy.sessions.tensorrt_versions import Backend, open_tensorrt
from chexnet_deploy.signing.release import Release
from chexnet_deploy.signing.trust import Trust
from chexnet_deploy.spec import read_spec
from chexnet_deploy.streaming import choose_flow, usable_cores
from chexnet_deploy.table_rows import Row, TableCard
from chexnet_deploy.tables import read_image_list

if TYPE_CHECKING:
    from chexnet_deploy.export.legacy import LegacyImport

MakeRows: TypeAlias = Callable[[Bundle, ImageFiles, TableCard, int], Generator[Row]]
"""Yields the rows of a table's images in order, from a place on."""

MAX_GATE_IMAGES = 512  # enough to catch a broken quantisation in a minute; `bench` is where the whole set is used
CHOSEN_LIST = "calibration.txt"
N_CONVOLUTIONS = 120  # of DenseNet-121 without its head


def parse_precisions(text: str) -> tuple[Precision, ...]:
    """Return the precisions a comma-separated list names, fp32 first and always.

    Raises:
        SpecError: an unknown precision.
    """
    known = [precision.value for precision in Precision]
    wanted = [name.strip() for name in text.split(",")]
    unknown = [name for name in wanted if name not in known]
    if unknown:
        raise SpecError(f"no precision named {', '.join(map(repr, unknown))}. There are {', '.join(known)}.")
    return tuple(precision for precision in Precision if precision is Precision.FP32 or precision.value in wanted)


def parse_dialects(text: str) -> tuple[Dialect, ...]:
    """Return the forms of int8 that a comma-separated list names.

    Raises:
        SpecError: an unknown form, or one twice.
    """
    known: tuple[Dialect, ...] = get_args(Dialect)
    wanted = [name.strip() for name in text.split(",")]
    if any(wanted.count(name) > 1 for name in wanted) or set(wanted) - set(known):
        raise SpecError(f"got int8 dialects {text!r}, needed some of {', '.join(known)}, each once.")
    return tuple(name for name in known if name in wanted)


def open_torch_room() -> ModuleType:
    """Import export.to_onnx.

    Raises:
        MissingPackageError: torch, onnx or safetensors is not installed.
    """
    try:
        from chexnet_deploy.export import to_onnx
    except ModuleNotFoundError as err:
        raise MissingPackageError(f"{err.name} is not installed. Run: pip install 'chexnet-deploy[export]'") from err
    return to_onnx


def import_legacy_file(path: Path, out: Path, form: str | None, findings_file: Path | None) -> "LegacyImport":
    """Convert a circulating CheXNet file into a new checkpoint.

    Raises:
        ChexnetError: torch is not installed, the file can't be converted exactly, or its findings aren't known.
    """
    open_torch_room()
    from chexnet_deploy.export.legacy import import_legacy, read_findings

    findings = None if findings_file is None else read_findings(findings_file)
    return import_legacy(path, out, form=form, findings=findings)


def export_bundles(
    checkpoint: Path,
    out: Path,
    precisions: Sequence[Precision],
    *,
    data_root: Path | None,
    calibration_list: Path | None,
    n_calibration_images: int,
    dialects: Sequence[Dialect],
    release: Release | None = None,
    on_phase: OnPhase,
    scope: ScopePolicy | None = None,
) -> list[Bundle]:
    """Make a bundle for each precision in `out`, fp32 first, all of the same release and scope; of int8 one for each dialect.

    The only int8, and the typed one of several, is in `int8`; the others are in `int8-mixed`, `int8-trt8`, `int8-cpu`.

    Raises:
        ChexnetError: any step refused; what was kept before it stays.
    """
    to_onnx = open_torch_room()
    if Precision.INT8 in precisions and data_root is None:
        raise CalibrationError("int8 needs calibration images. Give ChestX-ray14 by --data.")
    if Precision.INT8 not in precisions and calibration_list is not None:
        raise CalibrationError(
            "a calibration list is for int8 alone. Add it by --precision int8, or leave the list away."
        )
    int8_folders = {dialect: out / _int8_folder(dialect, dialects) for dialect in dialects}
    folders = [out / precision.value for precision in precisions if precision is not Precision.INT8]
    folders += int8_folders.values() if Precision.INT8 in precisions else []
    taken = [folder for folder in folders if folder.exists()]
    if taken:
        raise BundleError(f"{taken[0]} is there already. Choose another --out, or delete it first.")
    # The data are checked before any work is done: a wrong list should not cost minutes.
    dataset = None if data_root is None else ChestXray14.open(data_root)
    names: tuple[str, ...] | None = None
    if dataset is not None and Precision.INT8 in precisions:
        names = _calibration_names(dataset, calibration_list, n_calibration_images)
    on_phase("export fp32", 0, 1)
    fp32: Bundle = to_onnx.export_onnx(checkpoint, out / Precision.FP32.value, release=release, scope=scope)
    if names is not None and calibration_list is None:
        write_file(out / CHOSEN_LIST, "".join(f"{name}\n" for name in names).encode())
    on_phase("export fp32", 1, 1)
    bundles = [fp32]
    if len(precisions) == 1:
        return bundles
    from chexnet_deploy.quantize.calibration import CalibrationSet
    from chexnet_deploy.quantize.precision import to_fp16, to_int8

    validation = None
    if dataset is not None:
        validation = LabelledImages.of(dataset.split("val")[:MAX_GATE_IMAGES], fp32.manifest.findings)
    if Precision.FP16 in precisions:
        on_phase("quantise fp16", 0, 1)
        bundles.append(to_fp16(fp32, out / Precision.FP16.value, read_spec("fp16").gate, validation))
        on_phase("quantise fp16", 1, 1)
    if dataset is not None and names is not None and validation is not None:
        n_names = len(names)
        calibration = CalibrationSet.read(
            dataset,
            names,
            fp32.manifest.preprocessing,
            on_images=lambda done: on_phase("read calibration images", done, n_names),
        )
        for dialect, folder in int8_folders.items():
            # Measured only where the gate fails, so its length is not known before.
            phases = (f"quantise {folder.name}", f"find what {folder.name} must leave in floating point")
            bundles.append(
                to_int8(
                    fp32,
                    calibration,
                    folder,
                    read_spec("int8").gate,
                    validation,
                    dialect=dialect,
                    on_images=lambda done, phase=phases[0]: on_phase(phase, done, n_names),  # type: ignore[misc]
                    on_layer=lambda done, phase=phases[1]: on_phase(phase, done, N_CONVOLUTIONS),  # type: ignore[misc]
                )
            )
    return bundles


def _int8_folder(dialect: str, dialects: Sequence[str]) -> str:
    return "int8" if len(dialects) == 1 or dialect == "typed" else f"int8-{dialect}"


def require_tensorrt(backend: Backend) -> None:
    """Refuse before any work where plans can't be built.

    Raises:
        MissingPackageError, SessionError: no GPU, driver, binding to it, or TensorRT.
    """
    open_driver()
    open_tensorrt(backend)


def build_bundle(
    path: Path,
    out: Path,
    spec: str | None,
    *,
    backend: Backend = "tensorrt",
    device: int = 0,
    timing_cache: Path | None = None,
    trust: Trust | None = None,
    cancelled: threading.Event | None = None,
    on_phase: OnPhase,
) -> Bundle:
    """Build a plan bundle; the spec is that of the bundle's precision where none is named.

    The plan is of its bundle's release and isn't signed: whoever vouches for plans signs it once `bench` has passed.

    Raises:
        ChexnetError: no GPU or TensorRT, or a step refused; nothing is kept.
    """
    from chexnet_deploy.builder.engine import build_engine

    bundle = Bundle.open(path, trust=trust)
    chosen = read_spec(bundle.manifest.precision.value if spec is None else spec)
    return build_engine(
        bundle,
        chosen,
        out,
        backend=backend,
        device=device,
        timing_cache=timing_cache,
        cancelled=cancelled,
        on_phase=on_phase,
    )


def bench_bundles(
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
    """Measure bundles, write report.json, report.html and the logits into `out`, return the report.

    `image_list` narrows the split to the images it names.

    Raises:
        ChexnetError: a bundle, the data or the spec can't be used; or an engine refuses to run here.
    """
    report_room = _open_page_room("report") if with_html else None
    if image_list is not None and data_root is None:
        raise SpecError("a list of images needs the data they are in. Give ChestX-ray14 by --data.")
    bundles = [Bundle.open(path, trust=trust) for path in engine_paths]
    reference = (
        find_reference(bundles[0], trust=trust) if reference_path is None else Bundle.open(reference_path, trust=trust)
    )
    specs = [read_spec(bundle.manifest.precision.value if spec is None else spec) for bundle in bundles]
    images, data, whom = None, "no labelled images", ""
    if data_root is not None:
        radiographs, data = choose_images(ChestXray14.open(data_root), split, image_list)
        whom = say_who_is_known(reference, radiographs, split)
        images = LabelledImages.of(radiographs, reference.manifest.findings)
    # The folder is made first and shown last: a place that can't be written costs no measurement, and a report is whole.
    with _new_folder(out) as partial:
        run = run_bench(
            list(zip(bundles, specs, strict=True)),
            reference,
            images,
            data=data,
            whom=whom,
            effort=effort,
            threads=threads,
            provider=provider,
            on_phase=on_phase,
        )
        (partial / "report.json").write_text(run.report.model_dump_json(indent=1) + "\n")
        if images is not None:
            for name, logits in run.logits.items():
                write_predictions(partial / f"logits-{name}.csv", images, reference.manifest.findings, logits)
        if report_room is not None:
            with Predictor.open(engine_paths[-1], trust=trust, threads=threads, provider=provider) as predictor:
                report_room.write_html(partial / "report.html", run, predictor)
    return run.report


def predict_images(
    predictor: Predictor, images: ImageFiles, cam_folder: Path | None
) -> Iterator[tuple[str, Prediction | ImageError]]:
    """Yield (name, findings) for each image in order, or the ImageError that says why there are none.

    Draws the map of each finding called present (or of the likeliest) into a new folder, where one is given.

    Raises:
        ChexnetError: the session failed, the one file that was given can't be read, or two images would draw the same picture.
    """
    if cam_folder is not None:
        twice = sorted(stem for stem, count in Counter(path.stem for path in images.paths()).items() if count > 1)
        if twice:
            raise ImageError(
                f"{len(twice)} names are given twice, e.g. {twice[0]}: their pictures would be one. Run them apart."
            )
    with ExitStack() as stack:
        partial = None if cam_folder is None else stack.enter_context(_new_folder(cam_folder))
        answers = stack.enter_context(
            closing(predictor.predict_stream(images.paths(), with_maps=cam_folder is not None))
        )
        for name, (path, answer) in zip(images.names, answers, strict=True):
            _refuse_lone(images, answer)
            if partial is not None and not isinstance(answer, ImageError):
                _draw_cams(partial, predictor, path, answer)
            yield name, answer


def report_images(
    bundle: Bundle, images: ImageFiles, folder: Path, serial_number: str, *, threads: int | None, provider: Provider
) -> Iterator[tuple[str, Prediction | ImageError]]:
    """Yield (name, findings) for each DICOM file in order, or the ImageError that says why there are none.

    Writes a new folder with a folder for each, named by its SOP Instance UID: the structured report, and a Secondary Capture of
    each finding that is present.

    Raises:
        ChexnetError: the session failed, the one file that was given can't be read, a package is missing, or the folder is
            there already.
    """
    try:
        from chexnet_deploy.dicom.reporting import Reporter
        from chexnet_deploy.dicom.result import Device
    except ModuleNotFoundError as err:
        raise MissingPackageError(f"{err.name} is not installed. Run: pip install 'chexnet-deploy[dicom-out]'") from err
    device = Device(serial_number, model_name="chexnet-deploy predict")
    with ExitStack() as stack:
        partial = stack.enter_context(_new_folder(folder))
        predictor = stack.enter_context(Predictor.of(bundle, threads=threads, provider=provider))
        reporter = stack.enter_context(Reporter(bundle, predictor, device, max_pictures=len(bundle.manifest.findings)))
        for name, path in zip(images.names, images.paths(), strict=True):
            answer: Prediction | ImageError
            try:
                report = reporter.report(path, datetime.now().astimezone())
                _write_report(partial / report.source_uid, report.files)
                answer = report.prediction
            except ImageError as err:
                answer = err
            _refuse_lone(images, answer)
            yield name, answer


def _write_report(folder: Path, files: Mapping[str, bytes]) -> None:
    if folder.exists():
        raise ImageError(
            f"{folder.name}: found a second file with this SOP Instance UID; needed each image once. Next: name one of them."
        )
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content)


def predict_table(
    bundle: Bundle,
    images: ImageFiles,
    out: Path,
    *,
    threads: int | None,
    provider: Provider,
    on_phase: OnPhase,
    elsewhere: MakeRows | None = None,
) -> tuple[int, int]:
    """Write the findings in all images into one table, or go on with it; return its rows and those quarantined.

    Args:
        bundle: verified.
        images: a row for each, in order.
        out: .csv or .parquet.
        threads: CPU threads of one call; None for one where there are many images.
        provider: what runs an ONNX bundle.
        on_phase: told of every row.
        elsewhere: what makes the rows that are missing, e.g. a cluster; None for this process.

    Raises:
        ChexnetError: the bundle can't be used here, the table is another one or can't be written, or the one file that was
            given can't be read.
    """
    threads, provider, target = _threads_for(images, threads), resolve_provider(provider), bundle.manifest.target
    card = TableCard(
        bundle=bundle.id,
        preprocessing=bundle.manifest.preprocessing,
        findings=bundle.manifest.findings,
        operating_points=bundle.manifest.operating_points,
        backend=provider if target is None else target.backend,
        threads=threads,
        batch_size=choose_flow(bundle.manifest, threads=threads, provider=provider, cores=usable_cores()).batch_size,
        n_images=len(images.names),
        images_sha256=images.sha256,
    )
    with ExitStack() as stack:
        table = stack.enter_context(open_table(out, card, images.names))
        on_phase("predict", table.n_done, card.n_images)
        if table.n_done < card.n_images and elsewhere is not None:
            for row in stack.enter_context(closing(elsewhere(bundle, images, card, table.n_done))):
                table.add_row(row)
                on_phase("predict", table.n_done, card.n_images)
        elif table.n_done < card.n_images:
            predictor = stack.enter_context(open_predictor(bundle, images, threads=threads, provider=provider))
            answers = stack.enter_context(closing(predictor.predict_stream(images.paths(table.n_done))))
            for path, answer in answers:
                _refuse_lone(images, answer)
                table.add(path, answer)
                on_phase("predict", table.n_done, card.n_images)
        return table.n_done, table.n_quarantined


def open_predictor(bundle: Bundle, images: ImageFiles, *, threads: int | None, provider: Provider) -> Predictor:
    """Open a bundle for these images: one answers soonest with all cores at work on it, many with a core each.

    Raises:
        SessionError, MissingPackageError: see open_session.
    """
    return Predictor.of(bundle, threads=_threads_for(images, threads), provider=provider)


def _threads_for(images: ImageFiles, threads: int | None) -> int | None:
    return 1 if threads is None and len(images.names) > 1 else threads


def _refuse_lone(images: ImageFiles, answer: Prediction | ImageError) -> None:
    """Refuse the one file that was given, where it can't be read: a table of nothing helps nobody."""
    if images.is_one_file and isinstance(answer, ImageError):
        raise answer


def _draw_cams(folder: Path, predictor: Predictor, path: Path, prediction: Prediction) -> None:
    gray = predictor.read(path)
    likeliest = max(prediction.probabilities, key=prediction.probabilities.__getitem__)
    for finding in [name for name, is_there in prediction.present.items() if is_there] or [likeliest]:
        Image.fromarray(draw_cam(gray, prediction.maps[finding])).save(folder / f"{path.stem}_{finding}.png")


def evaluate(request: EvaluationRequest, out: Path | None, *, with_html: bool, on_phase: OnPhase) -> Evaluation:
    """Evaluate a bundle or predictions; write report.json and report.html into `out` where one is given.

    Raises:
        ChexnetError: a file, the bundle or an image can't be used, or the options don't fit the data.
    """
    page_room = _open_page_room("evaluation_report") if out is not None and with_html else None
    with ExitStack() as stack:
        partial = None if out is None else stack.enter_context(_new_folder(out))
        run = run_evaluation(request, on_phase=on_phase)
        if partial is not None:
            (partial / "report.json").write_text(run.evaluation.model_dump_json(indent=1) + "\n")
        if partial is not None and page_room is not None:
            on_phase("page", 0, 1)
            page_room.write_html(partial / "report.html", run)
            on_phase("page", 1, 1)
    return run.evaluation


@contextmanager
def _new_folder(path: Path) -> Iterator[Path]:
    """Yield a hidden folder that becomes `path` at the end.

    Raises:
        BundleError: something is there already, or it can't be written.
    """
    if path.exists() or path.is_symlink():
        raise BundleError(f"{path} is there already. Choose another folder, or delete it first.")
    try:
        with new_directory(path) as partial:
            yield partial
    except OSError as err:
        raise BundleError(f"{path} can't be written: {err.strerror}. Choose another folder.") from err


def _calibration_names(dataset: ChestXray14, given: Path | None, n_images: int) -> tuple[str, ...]:
    """Return the names to calibrate on, checked against the data set; their pixels are checked when they are read."""
    from chexnet_deploy.quantize.calibration import check_names, choose_calibration

    if given is None:
        return choose_calibration(dataset, n_images)
    names = read_image_list(given)
    check_names(dataset, names)
    return names


def _open_page_room(name: Literal["report", "evaluation_report"]) -> ModuleType:
    try:
        return importlib.import_module(f"chexnet_deploy.{name}")
    except ModuleNotFoundError as err:
        raise MissingPackageError(
            f"{err.name} is not installed, so no HTML can be made. Run: pip install 'chexnet-deploy[report]', or give --no-html."
        ) from err
