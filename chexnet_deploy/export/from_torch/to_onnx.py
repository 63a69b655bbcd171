"""Checkpoint -> fp32 ONNX bundle, kept only after ONNX Runtime answers as torch does."""

import logging
import tempfile
import warnings
from importlib.metadata import version
from pathlib import Path

import numpy as np
import onnx
import torch

from chexnet_deploy.bundle.bundle import Bundle
from chexnet_deploy.bundle.manifest import ONNX_MODEL, PROBE, Check, Manifest, Precision, hash_files
from chexnet_deploy.bundle.probe import Probe, draw_probe_pixels
from chexnet_deploy.bundle.signing.releases import Release
from chexnet_deploy.errors import ExportError
from chexnet_deploy.evaluation.gatekeeper import scaled_difference
from chexnet_deploy.evaluation.invariance import repeat_in_batches
from chexnet_deploy.export.from_torch.checkpoint import Checkpoint, read_checkpoint
from chexnet_deploy.export.from_torch.model import DeployGraph
from chexnet_deploy.images.scope import ScopePolicy
from chexnet_deploy.runtime.sessions.base import Session
from chexnet_deploy.runtime.sessions.ort import OrtSession

OPSET = 17  # the newest that TensorRT 8.6 reads, and only the TorchScript exporter still writes it
LOGIT_TOLERANCE = 1e-4  # times max(1, |logit|)
CAM_TOLERANCE = 1e-4  # times max(1, |logit|)
INVARIANCE_TOLERANCE = 1e-5  # times max(1, |logit|)


def export_onnx(
    checkpoint_path: Path, out: Path, *, release: Release | None = None, scope: ScopePolicy | None = None
) -> Bundle:
    """Export a checkpoint to a new fp32 bundle at `out`; what is made of it inherits release and scope.

    Args:
        checkpoint_path: a .safetensors checkpoint.
        out: where; nothing may be there yet.
        release: which release of which model line this is.
        scope: the radiographs the model is meant for; None: ScopePolicy's defaults hold.

    Raises:
        CheckpointError: the checkpoint can't be used.
        ExportError: ONNX Runtime answers otherwise than torch, or an image's answer depends on its batch.
        BundleError: `out` is there already or can't be written.
    """
    checkpoint = read_checkpoint(checkpoint_path)
    model = trace(checkpoint)
    probe = _answer_probe(checkpoint)
    session = OrtSession(model, checkpoint.manifest.preprocessing.resize_px)
    checks = (*_check_against_torch(session, probe, checkpoint), _check_invariance(session, probe))
    session.close()
    for check in checks:
        if not check.value <= check.limit:
            raise ExportError(
                f"the exported graph is not the model: {check.name} is {check.value:.2e}, {check.limit:.0e} is allowed. "
                f"No bundle was kept. Try the torch and onnxruntime versions in pyproject.toml."
            )
    probe_bytes = probe.to_bytes()
    manifest = Manifest(
        precision=Precision.FP32,
        findings=checkpoint.manifest.findings,
        preprocessing=checkpoint.manifest.preprocessing,
        head_bias=tuple(checkpoint.model.classifier.bias.tolist()),
        operating_points=checkpoint.manifest.operating_points,
        files=hash_files({ONNX_MODEL: model, PROBE: probe_bytes}),
        checkpoint_sha256=checkpoint.sha256,
        release=release,
        trained_on=checkpoint.manifest.trained_on,
        scope=scope,
        probe_max_abs_logit_error=checks[0].value,
        checks=checks,
        tools={name: version(name) for name in ("chexnet-deploy", "torch", "onnx", "onnxruntime")},
    )
    return Bundle.write(out, manifest, model, probe_bytes)


def trace(checkpoint: Checkpoint) -> bytes:
    """Return the deploy graph of a checkpoint as ONNX bytes: `pixels` in; `logits` and `cam` out; any batch size."""
    side = checkpoint.manifest.preprocessing.resize_px
    graph = DeployGraph(checkpoint.model, checkpoint.manifest.preprocessing).eval()
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        path = Path(folder) / ONNX_MODEL
        # torch prefers its dynamo exporter, which can't write opset 17.
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)
        torch.onnx.export(
            graph,
            (torch.zeros((2, 1, side, side), dtype=torch.uint8),),
            str(path),
            dynamo=False,
            opset_version=OPSET,
            input_names=["pixels"],
            output_names=["logits", "cam"],
            dynamic_axes={"pixels": {0: "N"}, "logits": {0: "N"}, "cam": {0: "N"}},
        )
        model = onnx.load(str(path))
    _remove_identities(model.graph)
    onnx.checker.check_model(model, full_check=True)
    content: bytes = model.SerializeToString()
    return content


def _remove_identities(graph: onnx.GraphProto) -> None:
    """Feed consumers of an Identity from its source: the exporter shares equal weights through Identity nodes."""
    sources = {node.output[0]: node.input[0] for node in graph.node if node.op_type == "Identity"}
    for node in graph.node:
        for i, name in enumerate(node.input):
            node.input[i] = sources.get(name, name)
    kept = [node for node in graph.node if node.op_type != "Identity"]
    del graph.node[:]
    graph.node.extend(kept)


def _answer_probe(checkpoint: Checkpoint) -> Probe:
    pixels = draw_probe_pixels(checkpoint.manifest.preprocessing.resize_px)
    graph = DeployGraph(checkpoint.model, checkpoint.manifest.preprocessing).eval()
    with torch.inference_mode():
        logits, cam = graph(torch.from_numpy(pixels))
    return Probe(pixels, logits.numpy(), cam.numpy())


def _check_against_torch(session: Session, probe: Probe, checkpoint: Checkpoint) -> tuple[Check, Check]:
    """Compare with torch's answers: there is no parent bundle yet that a Gatekeeper could judge beside."""
    logits, cam = session.run(probe.pixels)
    from_cam = cam.mean(axis=(2, 3), dtype=np.float64) + checkpoint.model.classifier.bias.detach().numpy()
    return (
        Check(
            name="max |logit - torch's logit| / max(1, |logit|)",
            value=scaled_difference(logits, probe.logits),
            limit=LOGIT_TOLERANCE,
        ),
        Check(
            name="max |mean(cam) + bias - logit| / max(1, |logit|)",
            value=float((np.abs(from_cam - logits) / np.maximum(1.0, np.abs(probe.logits))).max()),
            limit=CAM_TOLERANCE,
        ),
    )


def _check_invariance(session: Session, probe: Probe) -> Check:
    """Ask again in other batch sizes and slots: TensorRT#4813 shows that engines can fail this silently."""
    again = repeat_in_batches(session, probe.pixels, len(probe.pixels))
    worst = max(scaled_difference(each.got, each.wanted) for each in (again.slots, again.neighbours))
    return Check(
        name="max logit change with batch size or slot / max(1, |logit|)", value=worst, limit=INVARIANCE_TOLERANCE
    )
