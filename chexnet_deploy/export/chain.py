"""Export in one function a command: checkpoint -> fp32, fp16 and int8 bundles -> TensorRT plans. Computes nothing itself.

The command line, the demo and the benchmarks call these.
"""

import logging
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np

from chexnet_deploy.bundle import Bundle, Trust
from chexnet_deploy.bundle.manifest import Dialect, Precision
from chexnet_deploy.bundle.signing.releases import Release
from chexnet_deploy.datasets.csv_rows import read_names
from chexnet_deploy.datasets.data_set import DataSet, open_data
from chexnet_deploy.datasets.labelled import LabelledImages
from chexnet_deploy.datasets.patients import refuse_training_patients
from chexnet_deploy.errors import BundleError, CalibrationError, DatasetError, OnPhase, require
from chexnet_deploy.evaluation.spec import read_spec
from chexnet_deploy.files import write_file
from chexnet_deploy.images.scope import ScopePolicy
from chexnet_deploy.runtime.contract import read_contract
from chexnet_deploy.runtime.sessions.driver import open_driver
from chexnet_deploy.runtime.sessions.trt_versions import Backend, open_tensorrt

if TYPE_CHECKING:
    from chexnet_deploy.export.from_torch.import_legacy import LegacyImport

_LOG = logging.getLogger(__name__)

MAX_GATE_IMAGES = 512  # enough to catch a broken quantisation in a minute; `bench` is where the whole set is used
CHOSEN_LIST = "calibration.txt"
N_CONVOLUTIONS = 120  # of DenseNet-121 without its head


def import_to_onnx() -> ModuleType:
    """Import from_torch.to_onnx, and torch with it.

    Raises:
        MissingPackageError: torch, onnx or safetensors is not installed.
    """
    with require("export"):
        from chexnet_deploy.export.from_torch import to_onnx
    return to_onnx


def import_checkpoint(path: Path, out: Path, form: str | None, findings_file: Path | None) -> "LegacyImport":
    """Convert a circulating CheXNet file into a new checkpoint.

    Raises:
        ChexnetError: torch is not installed, the file can't be converted exactly, or its findings aren't known.
    """
    import_to_onnx()
    from chexnet_deploy.export.from_torch.import_legacy import import_legacy, read_findings

    findings = None if findings_file is None else read_findings(findings_file)
    return import_legacy(path, out, form=form, findings=findings)


def _export_fp32(
    source: Path, contract_file: Path | None, out: Path, release: Release | None, scope: ScopePolicy | None
) -> Bundle:
    to_onnx = import_to_onnx()
    if contract_file is None and source.suffix != ".onnx":
        made: Bundle = to_onnx.export_onnx(source, out, release=release, scope=scope)
        return made
    from chexnet_deploy.export.from_onnx.bundle import export_foreign

    contract = None if contract_file is None else read_contract(contract_file)
    return export_foreign(source, contract, out, release=release, scope=scope)


def _export_reduced(
    source: Path,
    contract_file: Path | None,
    out: Path,
    release: Release | None,
    scope: ScopePolicy | None,
    dataset: DataSet,
) -> Bundle:
    with require("dicom", so="no DICOM can be made to judge it on"):
        from chexnet_deploy.export.decoding import reduce_decoding

    with tempfile.TemporaryDirectory() as folder:
        exact = _export_fp32(source, contract_file, Path(folder) / out.name, release, scope)
        return reduce_decoding(exact, out, read_spec("int8").gate, _validation(dataset, exact))


def _validation(dataset: DataSet, fp32: Bundle) -> LabelledImages:
    val = dataset.require("val")
    return val.take(np.arange(min(len(val.names), MAX_GATE_IMAGES))).for_findings(fp32.manifest.findings)


def _warn_of_known(dataset: DataSet, fp32: Bundle) -> None:
    """Say before minutes of work what `bench` will refuse after it."""
    try:
        refuse_training_patients(dataset.patients_of("test"), fp32.manifest.trained_on, purpose="bench")
    except DatasetError as err:
        _LOG.warning("warning: bench will refuse the test images. %s", err)


def export_bundles(
    checkpoint: Path,
    out: Path,
    precisions: Sequence[Precision],
    *,
    data_root: Path | None,
    calibration_list: Path | None,
    n_calibration_images: int,
    dialects: Sequence[Dialect],
    contract: Path | None = None,
    release: Release | None = None,
    on_phase: OnPhase,
    scope: ScopePolicy | None = None,
    is_reduced: bool = False,
) -> list[Bundle]:
    """Make a bundle for each precision in `out`, fp32 first, all of the same release and scope; of int8 one for each dialect.

    With `is_reduced` all decode JPEG 2000 at a reduced resolution, if the model then answers as it does to every pixel.

    `checkpoint` is a .safetensors file, or an ONNX file that `contract` describes. The only int8, and the typed one of several,
    is in `int8`; the others are in `int8-mixed`, `int8-trt8`, `int8-cpu`.

    Raises:
        ChexnetError: any step refused; what was kept before it stays.
    """
    import_to_onnx()
    if Precision.INT8 in precisions and data_root is None:
        raise CalibrationError("int8 needs calibration images. Give labelled images by --data.")
    if Precision.INT8 not in precisions and calibration_list is not None:
        raise CalibrationError(
            "a calibration list is for int8 alone. Add it by --precision int8, or leave the list away."
        )
    if is_reduced and data_root is None:
        raise CalibrationError("reduced decoding is judged on validation images. Give labelled images by --data.")
    int8_folders = {dialect: out / _int8_folder(dialect, dialects) for dialect in dialects}
    folders = [out / precision.value for precision in precisions if precision is not Precision.INT8]
    folders += int8_folders.values() if Precision.INT8 in precisions else []
    taken = [folder for folder in folders if folder.exists()]
    if taken:
        raise BundleError(f"{taken[0]} is there already. Choose another --out, or delete it first.")
    # The data are checked before any work is done: a wrong list should not cost minutes.
    dataset = None if data_root is None else open_data(data_root)
    names: tuple[str, ...] | None = None
    if dataset is not None and Precision.INT8 in precisions:
        names = _calibration_names(dataset, calibration_list, n_calibration_images)
    on_phase("export fp32", 0, 1)
    place = out / Precision.FP32.value
    if is_reduced:
        assert dataset is not None  # refused above
        fp32 = _export_reduced(checkpoint, contract, place, release, scope, dataset)
    else:
        fp32 = _export_fp32(checkpoint, contract, place, release, scope)
    if names is not None and calibration_list is None:
        write_file(out / CHOSEN_LIST, "".join(f"{name}\n" for name in names).encode())
    on_phase("export fp32", 1, 1)
    if dataset is not None:
        _warn_of_known(dataset, fp32)
    bundles = [fp32]
    if len(precisions) == 1:
        return bundles
    from chexnet_deploy.export.quantize.calibration import CalibrationSet
    from chexnet_deploy.export.quantize.quantize import to_fp16, to_int8

    validation = None if dataset is None else _validation(dataset, fp32)
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


def build_plan(
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
    from chexnet_deploy.export.tensorrt.build import build_tensorrt_plan

    bundle = Bundle.open(path, trust=None if trust is None else trust.without_pass())
    chosen = read_spec(bundle.manifest.precision.value if spec is None else spec)
    return build_tensorrt_plan(
        bundle,
        chosen,
        out,
        backend=backend,
        device=device,
        timing_cache=timing_cache,
        cancelled=cancelled,
        on_phase=on_phase,
    )


def build_plans(
    path: Path,
    folder: Path,
    n_builds: int,
    spec: str | None,
    *,
    trust: Trust | None = None,
    cancelled: threading.Event | None = None,
    on_phase: OnPhase,
) -> list[Bundle]:
    """Build plans of one bundle into a folder, numbered from 1: no two builds of TensorRT need be the same.

    Without a timing cache, which would make them alike.

    Raises:
        ChexnetError: as build_plan; the plans before it stay.
    """
    return [
        build_plan(
            path,
            folder / f"{path.resolve().name}-{i}",
            spec,
            trust=trust,
            cancelled=cancelled,
            on_phase=lambda phase, done, total, i=i: on_phase(f"build {i}: {phase}", done, total),  # type: ignore[misc]
        )
        for i in range(1, n_builds + 1)
    ]


def _calibration_names(dataset: DataSet, given: Path | None, n_images: int) -> tuple[str, ...]:
    """Return the names to calibrate on, checked against the data set; their pixels are checked when they are read."""
    from chexnet_deploy.export.quantize.calibration import check_names, choose_calibration

    if given is None:
        return choose_calibration(dataset, n_images)
    names = read_names(given)
    check_names(dataset, names)
    return names
