"""The models that benchmarks/cpu/peers.py times, made once and kept in a folder, with the accuracy of each."""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import openvino
import torch

from benchmarks.int8.accuracy import Accuracy, Judge, cores
from benchmarks.int8.recipes import Answer, StaticOpenvino, nncf_int8, ort_default
from chexnet_deploy.bundle import Bundle, Precision
from chexnet_deploy.datasets import DataSet
from chexnet_deploy.datasets.csv_rows import read_names
from chexnet_deploy.export.chain import export_bundles
from chexnet_deploy.export.from_torch.checkpoint import Checkpoint, read_checkpoint
from chexnet_deploy.export.from_torch.model import CheXNet, DeployGraph
from chexnet_deploy.export.from_torch.to_onnx import trace
from chexnet_deploy.export.quantize.calibration import CalibrationSet, choose_calibration
from chexnet_deploy.files import write_file
from chexnet_deploy.images.preprocessing import Pixels
from chexnet_deploy.inputs import Record
from chexnet_deploy.runtime.score import iter_pixels
from chexnet_deploy.runtime.sessions.base import Logits, Session, run_in_batches
from chexnet_deploy.runtime.sessions.openvino import OpenvinoSession
from chexnet_deploy.runtime.sessions.ort import OrtSession

ORT_FP32, ORT_INT8, OPENVINO_FP32 = "ONNX Runtime, fp32", "ONNX Runtime, default int8", "OpenVINO, fp32"
NNCF: Final[Mapping[str, str]] = {preset: f"OpenVINO, NNCF int8 ({preset})" for preset in ("PERFORMANCE", "MIXED")}
OURS: Final[Mapping[str, str]] = {
    "fp32": "ours, fp32",
    "int8-cpu": "ours, int8",
    "int8": "ours, typed int8 on OpenVINO",
}
PEERS_OPENVINO = (OPENVINO_FP32, *NNCF.values())

_BATCH = 16


class Prepared(Record):
    """What is known of the models before any is timed.

    Attributes:
        accuracy: by engine, beside torch.
        nncf_with_open_batch: noise_mean of NNCF's model (PERFORMANCE) compiled with an open batch dimension.
    """

    n_calibration_images: int
    n_test_images: int
    fp32_mean_auroc: float
    accuracy: dict[str, Accuracy]
    nncf_with_open_batch: float


@dataclass(frozen=True, slots=True)
class Models:
    """All models, as files.

    Attributes:
        published: what torch runs: the paper's order of layers, pixels in, logits and maps out.
        folder: see the properties.
        pixels: of the test images, uint8 [N, 1, S, S].
    """

    published: DeployGraph
    folder: Path
    pixels: Pixels
    prepared: Prepared

    @property
    def side(self) -> int:
        """Pixels on a side."""
        return int(self.pixels.shape[-1])


def published_order(model: CheXNet) -> CheXNet:
    """Return a copy with each transition as the paper has it, the convolution before the pooling; the weights are the same."""
    published = copy.deepcopy(model)
    for name, block in published.features.named_children():
        if name.startswith("transition"):
            pool = block.get_submodule("pool")
            del block.pool
            block.add_module("pool", pool)
    return published


def prepare_models(
    checkpoint_path: Path, dataset: DataSet, images: Path | None, n_calibration: int, folder: Path, isa: str
) -> Models:
    """Make what the folder lacks, and return all.

    Args:
        checkpoint_path: of the model.
        dataset: holds training images for calibration, and those to judge on.
        images: list of these; None takes the test split.
        n_calibration: training images for every int8 model.
        folder: keeps the models; made by an earlier call with the same arguments, or empty.
        isa: instructions of this process; accuracies are kept for each.
    """
    checkpoint = read_checkpoint(checkpoint_path)
    manifest = checkpoint.manifest
    published = DeployGraph(published_order(checkpoint.model), manifest.preprocessing).eval()
    chosen = dataset.require("test") if images is None else dataset.select(read_names(images))
    test = chosen.for_findings(manifest.findings)
    pixels = np.concatenate(list(iter_pixels(test.paths, manifest.preprocessing)))
    _make_missing(checkpoint_path, checkpoint, dataset, n_calibration, folder)
    kept = folder / f"prepared-{isa}.json"
    if not kept.exists():
        judge = Judge(torch_logits(published, pixels), test, manifest.findings, manifest.operating_points)
        write_file(kept, _measure(folder, pixels, judge, n_calibration).model_dump_json(indent=1).encode())
    return Models(published, folder, pixels, Prepared.model_validate_json(kept.read_text()))


def torch_logits(graph: DeployGraph, pixels: Pixels) -> Logits:
    """Return torch's answers."""
    with torch.inference_mode():
        parts = [graph(torch.from_numpy(pixels[i : i + _BATCH]))[0].numpy() for i in range(0, len(pixels), _BATCH)]
    return np.concatenate(parts)


def _make_missing(
    checkpoint_path: Path, checkpoint: Checkpoint, dataset: DataSet, n_calibration: int, folder: Path
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "bundles").exists():
        export_bundles(
            checkpoint_path,
            folder / "bundles",
            (Precision.FP32, Precision.INT8),
            data_root=dataset.root,
            calibration_list=None,
            n_calibration_images=n_calibration,
            dialects=("typed", "cpu"),
            on_phase=lambda phase, done, total: None,
        )
    names = choose_calibration(dataset, n_calibration)
    calibration = CalibrationSet.read(dataset, names, checkpoint.manifest.preprocessing).pixels
    published = folder / "published.onnx"
    if not published.exists():
        ordered = published_order(checkpoint.model)
        write_file(published, trace(Checkpoint(ordered, checkpoint.manifest, checkpoint.sha256)))
    model = published.read_bytes()
    if not (folder / "ort-int8.onnx").exists():
        write_file(folder / "ort-int8.onnx", ort_default(model, calibration))
    for preset in NNCF:
        if not (folder / f"nncf-{preset}.xml").exists():
            made = nncf_int8(model, calibration, preset, has_fast_bias_correction=True)  # type: ignore[arg-type]
            openvino.save_model(made, folder / f"nncf-{preset}.xml", compress_to_fp16=False)


def peer_model(folder: Path, engine: str) -> Any:
    """Return what OpenVINO is given for a peer: an openvino.Model."""
    names = {OPENVINO_FP32: "published.onnx", **{name: f"nncf-{preset}.xml" for preset, name in NNCF.items()}}
    return openvino.Core().read_model(folder / names[engine])


def session_of(folder: Path, engine: str) -> Session:
    """Open one of ours, or ONNX Runtime's."""
    for bundle, name in OURS.items():
        if name == engine:
            return OpenvinoSession.open(Bundle.open(folder / "bundles" / bundle))
    side = Bundle.open(folder / "bundles" / "fp32").manifest.preprocessing.resize_px
    return OrtSession((folder / {ORT_FP32: "published.onnx", ORT_INT8: "ort-int8.onnx"}[engine]).read_bytes(), side)


def _measure(folder: Path, pixels: Pixels, judge: Judge, n_calibration: int) -> Prepared:
    def fixed(engine: str) -> Answer:
        side = pixels.shape[-1]
        return StaticOpenvino(
            peer_model(folder, engine), side, batch=_BATCH, piece=_BATCH, streams=1, threads=cores()
        ).answer

    def session(engine: str) -> Answer:
        return lambda images: run_in_batches(session_of(folder, engine), images)[0]

    opened: dict[str, Callable[[str], Answer]] = {
        **dict.fromkeys((ORT_FP32, ORT_INT8, *OURS.values()), session),
        **dict.fromkeys(PEERS_OPENVINO, fixed),
    }
    accuracy = {engine: judge.accuracy(open_engine(engine)(pixels)) for engine, open_engine in opened.items()}
    wrong = StaticOpenvino(
        peer_model(folder, NNCF["PERFORMANCE"]), pixels.shape[-1], batch=_BATCH, piece=None, streams=1, threads=cores()
    )
    return Prepared(
        n_calibration_images=n_calibration,
        n_test_images=len(pixels),
        fp32_mean_auroc=judge.accuracy(judge.reference).mean_auroc,
        accuracy=accuracy,
        nncf_with_open_batch=judge.accuracy(wrong.answer(pixels)).noise_mean,
    )
