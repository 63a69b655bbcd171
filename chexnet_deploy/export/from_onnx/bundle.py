"""An ONNX file by its contract -> fp32 bundle, kept only after the bundle's graph answers as the file does.

A bundle has activation maps, which exist where a network ends in a mean over space and a linear layer, as DenseNets and ResNets
do: the layer then runs as a 1x1 convolution before the mean. Any other network is measured by its contract as it is.
"""

from importlib.metadata import version
from pathlib import Path
from typing import Final

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from chexnet_deploy.bundle.bundle import Bundle
from chexnet_deploy.bundle.manifest import ONNX_MODEL, PROBE, Check, Manifest, Precision, hash_files
from chexnet_deploy.bundle.probe import Probe, draw_probe_pixels
from chexnet_deploy.bundle.signing.releases import Release
from chexnet_deploy.errors import ExportError
from chexnet_deploy.evaluation.gatekeeper import scaled_difference
from chexnet_deploy.evaluation.invariance import repeat_in_batches
from chexnet_deploy.files import sha256_hex
from chexnet_deploy.images import Preprocessing, ScopePolicy
from chexnet_deploy.runtime.contract import IGNORED, Contract
from chexnet_deploy.runtime.engine import ForeignModel, find_engine, open_engine
from chexnet_deploy.runtime.sessions.base import run_in_batches
from chexnet_deploy.runtime.sessions.ort import OrtSession

TOLERANCE: Final = 1e-4  # times max(1, |logit|)
_INSTEAD: Final = "bench and evaluate measure the file as it is by --contract"
_MEANS: Final = {"GlobalAveragePool", "ReduceMean"}
_PASSING: Final = {"Flatten", "Reshape", "Squeeze", "Identity", "Dropout"}  # between the mean and the linear layer


def export_foreign(
    path: Path,
    contract: Contract | None,
    out: Path,
    *,
    release: Release | None = None,
    scope: ScopePolicy | None = None,
) -> Bundle:
    """Make an fp32 bundle of an ONNX file; what is made of it inherits release and scope.

    Args:
        path: the file.
        contract: what it takes and answers; without one it is refused.
        out: where; nothing may be there yet.
        release: which release of which model line this is.
        scope: the radiographs the model is meant for; None: ScopePolicy's defaults hold.

    Raises:
        SpecError: no contract.
        SessionError: the file can't be run, or isn't its contract's.
        ExportError: it can't be a bundle, or the bundle's graph answers otherwise.
        BundleError: `out` is there already or can't be written.
    """
    source = find_engine(path, contract)
    assert isinstance(source, ForeignModel)  # of an ONNX file, or refused
    contract = source.contract
    preprocessing = _preprocessing(path, contract)
    session = open_engine(source)
    pixels = draw_probe_pixels(preprocessing.resize_px)
    wanted, _ = run_in_batches(session, pixels)
    session.close()
    model, bias = wrap(path, source.model or b"", contract, preprocessing)
    ours = OrtSession(model, preprocessing.resize_px)
    logits, cam = run_in_batches(ours, pixels)
    cells = preprocessing.resize_px // 32
    if cam.shape[2:] != (cells, cells):
        raise ExportError(
            f"{path}: found maps of {cam.shape[2]} x {cam.shape[3]} cells, needed {cells} x {cells}, one for 32 px, as bundles "
            f"have; {_INSTEAD}."
        )
    again = repeat_in_batches(ours, pixels, len(pixels))
    from_cam = cam.mean(axis=(2, 3), dtype=np.float64) + bias
    checks = (
        Check(
            name="max |logit - the file's logit| / max(1, |logit|)",
            value=scaled_difference(logits, wanted),
            limit=TOLERANCE,
        ),
        Check(
            name="max |mean(cam) + bias - logit| / max(1, |logit|)",
            value=scaled_difference(from_cam, wanted),
            limit=TOLERANCE,
        ),
        Check(
            name="max logit change with batch size or slot / max(1, |logit|)",
            value=max(scaled_difference(each.got, each.wanted) for each in (again.slots, again.neighbours)),
            limit=TOLERANCE,
        ),
    )
    ours.close()
    for check in checks:
        if not check.value <= check.limit:
            raise ExportError(
                f"the bundle's graph is not {path}: {check.name} is {check.value:.2e}, {check.limit:.0e} is allowed. "
                f"No bundle was kept; {_INSTEAD}."
            )
    probe = Probe(pixels, wanted, cam).to_bytes()
    manifest = Manifest(
        precision=Precision.FP32,
        findings=contract.findings,
        preprocessing=preprocessing,
        head_bias=tuple(bias.tolist()),
        operating_points=contract.operating_points,
        files=hash_files({ONNX_MODEL: model, PROBE: probe}),
        checkpoint_sha256=sha256_hex(source.model or b""),
        release=release,
        scope=scope,
        probe_max_abs_logit_error=float(np.abs(logits - wanted).max()),
        checks=checks,
        tools={name: version(name) for name in ("chexnet-deploy", "onnx", "onnxruntime")},
    )
    return Bundle.write(out, manifest, model, probe)


def _preprocessing(path: Path, contract: Contract) -> Preprocessing:
    """Return a contract's preprocessing as a bundle has it.

    Raises:
        ExportError: a bundle has none such, or its probability is not the sigmoid of a logit.
    """
    given = contract.input
    low, high = given.range
    mean, std = (np.broadcast_to(values, 3).astype(np.float64) for values in (given.mean, given.std))
    if "softmax" in (contract.output.values, contract.output.score):
        raise ExportError(f"{path}: found a softmax, needed one sigmoid a finding, as bundles have; {_INSTEAD}.")
    try:
        return Preprocessing.model_validate(
            {
                "resize_px": given.size,
                "resample": given.resizing.resample,
                "geometry": given.geometry,
                "mean": tuple(((mean - low) / (high - low)).tolist()),
                "std": tuple((std / (high - low)).tolist()),
            }
        )
    except ValueError as err:
        raise ExportError(
            f"{path}: found {given.interpolation}, {given.geometry}, {given.size} px and black to white {low:g} to {high:g}; "
            f"needed bilinear, squash, a multiple of 32 px up to 1024, and a mean between black and white, as bundles "
            f"have; {_INSTEAD}."
        ) from err


def wrap(
    path: Path, content: bytes, contract: Contract, preprocessing: Preprocessing
) -> tuple[bytes, NDArray[np.float64]]:
    """Return the deploy graph of an ONNX file, `pixels` in, `logits` and `cam` out, and its head's bias [C].

    Raises:
        ExportError: the network doesn't end in a mean over space and a linear layer, or its input is not float32.
    """
    model = onnx.load_model_from_string(content)
    graph = model.graph
    _simplify(graph)
    (taken,) = [each for each in graph.input if each.name not in {tensor.name for tensor in graph.initializer}]
    if taken.type.tensor_type.elem_type != TensorProto.FLOAT or taken.type.tensor_type.shape.dim[0].dim_value:
        raise ExportError(
            f"{path}: found another input than float32 with an open batch, needed that. Export it so; or {_INSTEAD}."
        )
    output = contract.output.name or graph.output[0].name
    features, weight, bias = _find_head(path, graph, output, is_sigmoid=contract.output.values == "sigmoids")
    named = [k for k, finding in enumerate(contract.output.findings) if finding != IGNORED]
    weight, bias = weight[named], bias[named]
    side, n, cells = preprocessing.resize_px, len(named), preprocessing.resize_px // 32
    stem = _stem(taken.name, contract, preprocessing)
    head = [
        helper.make_node("Conv", [features, "chexnet/weight"], ["cam"], "chexnet/Conv", kernel_shape=[1, 1]),
        helper.make_node("GlobalAveragePool", ["cam"], ["chexnet/mean"], "chexnet/GlobalAveragePool"),
        helper.make_node("Flatten", ["chexnet/mean"], ["chexnet/flat"], "chexnet/Flatten"),
        helper.make_node("Add", ["chexnet/flat", "chexnet/bias"], ["logits"], "chexnet/Add"),
    ]
    graph.initializer.extend(
        [
            numpy_helper.from_array(weight[:, :, None, None].astype(np.float32), "chexnet/weight"),
            numpy_helper.from_array(bias.astype(np.float32), "chexnet/bias"),
        ]
    )
    nodes = _reaching(graph, features)
    del graph.node[:]
    graph.node.extend([*stem, *nodes, *head])
    used = {name for node in graph.node for name in node.input}
    kept = [tensor for tensor in graph.initializer if tensor.name in used]
    for field, values in (
        (graph.initializer, kept),
        (graph.value_info, []),
        (graph.input, [helper.make_tensor_value_info("pixels", TensorProto.UINT8, ["N", 1, side, side])]),
        (
            graph.output,
            [
                helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["N", n]),
                helper.make_tensor_value_info("cam", TensorProto.FLOAT, ["N", n, cells, cells]),
            ],
        ),
    ):
        copies = [type(value).FromString(value.SerializeToString()) for value in values]
        del field[:]
        field.extend(copies)
    try:
        onnx.checker.check_model(model, full_check=True)
    except Exception as err:  # the checker and the shape inference under it share no class of error
        raise ExportError(f"{path}: found a graph that ONNX refuses ({err}), needed a sound one; {_INSTEAD}.") from err
    wrapped: bytes = model.SerializeToString()
    return wrapped, bias.astype(np.float64)


def _stem(taken: str, contract: Contract, preprocessing: Preprocessing) -> list[onnx.NodeProto]:
    """Return the nodes from `pixels` to the file's own input: Cast, Mul, Sub, as CheXNet's graph has them."""
    given = contract.input
    mean, std = np.array(preprocessing.mean), np.array(preprocessing.std)
    order = [0] if given.channels == "gray" else [0, 1, 2] if given.channels == "rgb" else [2, 1, 0]
    numbers = {"scale": 1.0 / (255.0 * std[order]), "shift": (mean / std)[order]}
    constants = [
        helper.make_node(
            "Constant",
            [],
            [f"chexnet/{name}"],
            f"chexnet/{name}",
            value=numpy_helper.from_array(values.astype(np.float32).reshape(1, -1, 1, 1)),
        )
        for name, values in numbers.items()
    ]
    is_last = given.layout == "NHWC"
    nodes = [
        helper.make_node("Cast", ["pixels"], ["chexnet/float"], "chexnet/Cast", to=TensorProto.FLOAT),
        helper.make_node("Mul", ["chexnet/float", "chexnet/scale"], ["chexnet/scaled"], "chexnet/Mul"),
        helper.make_node(
            "Sub", ["chexnet/scaled", "chexnet/shift"], ["chexnet/first" if is_last else taken], "chexnet/Sub"
        ),
    ]
    if is_last:
        nodes.append(helper.make_node("Transpose", ["chexnet/first"], [taken], "chexnet/Transpose", perm=[0, 2, 3, 1]))
    return [*constants, *nodes]


def _find_head(
    path: Path, graph: onnx.GraphProto, output: str, *, is_sigmoid: bool
) -> tuple[str, NDArray[np.float32], NDArray[np.float32]]:
    """Return the tensor [N, F, h, w] whose mean the linear layer reads, that layer's weight [K, F] and bias [K].

    Raises:
        ExportError: the network ends otherwise.
    """
    made_by = {name: node for node in graph.node for name in node.output}
    arrays = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    seen: list[str] = []

    def back(tensor: str, passing: set[str]) -> onnx.NodeProto:
        while True:
            node = made_by.get(tensor)
            seen.append("nothing" if node is None else node.op_type)
            if node is None or node.op_type not in passing:
                return node or onnx.NodeProto()
            tensor = node.input[0]

    node = back(output, {"Identity"})
    if is_sigmoid:
        node = back(node.input[0], {"Identity"}) if node.op_type == "Sigmoid" else onnx.NodeProto()
    weight = bias = None
    if node.op_type == "Add":  # MatMul and Add
        bias = next((arrays[name] for name in node.input if name in arrays), None)
        node = back(next((name for name in node.input if name not in arrays), ""), set())
        weight = arrays[node.input[1]].T if node.op_type == "MatMul" and node.input[1] in arrays else None
    elif node.op_type == "Gemm" and node.input[1] in arrays:
        options = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        weight = arrays[node.input[1]] if options.get("transB") else arrays[node.input[1]].T
        weight = options.get("alpha", 1.0) * weight
        bias = np.zeros(len(weight), np.float32)
        if len(node.input) > 2:
            bias = None if node.input[2] not in arrays else options.get("beta", 1.0) * arrays[node.input[2]]
        weight = None if options.get("transA") else weight
    mean = onnx.NodeProto() if weight is None else back(node.input[0], _PASSING)
    if weight is None or bias is None or bias.shape != weight.shape[:1] or mean.op_type not in _MEANS:
        raise ExportError(
            f"{path}: found {', '.join(reversed(seen))} at the network's end; needed a mean over space, a linear layer"
            f"{' and a sigmoid' if is_sigmoid else ''}, of which activation maps can be made; {_INSTEAD}."
        )
    return mean.input[0], np.asarray(weight, np.float32), np.asarray(bias, np.float32)


def _simplify(graph: onnx.GraphProto) -> None:
    """Read what is equal under one name and from one place: no Identity, and every constant an initialiser."""
    sources: dict[str, str] = {}
    for node in graph.node:
        for i, name in enumerate(node.input):
            node.input[i] = sources.get(name, name)
        if node.op_type == "Identity":
            sources[node.output[0]] = node.input[0]
        elif node.op_type == "Constant" and node.attribute[0].name == "value":
            tensor = TensorProto.FromString(node.attribute[0].t.SerializeToString())
            tensor.name = node.output[0]
            graph.initializer.append(tensor)
    shown = {each.name for each in graph.output}
    kept = [
        onnx.NodeProto.FromString(node.SerializeToString())
        for node in graph.node
        if shown & set(node.output)
        or not (node.op_type == "Identity" or (node.op_type == "Constant" and node.attribute[0].name == "value"))
    ]
    del graph.node[:]
    graph.node.extend(kept)


def _reaching(graph: onnx.GraphProto, tensor: str) -> list[onnx.NodeProto]:
    """Return the nodes that a tensor is made by, in the graph's order."""
    wanted, kept = {tensor}, []
    for node in reversed(graph.node):
        if wanted & set(node.output):
            wanted |= set(node.input)
            kept.append(onnx.NodeProto.FromString(node.SerializeToString()))
    return kept[::-1]
