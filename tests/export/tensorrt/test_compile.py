"""TensorRT for RTX really compiles what this package exports; it needs no GPU for that."""

import gzip
import json
import signal
import threading
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Literal

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from chexnet_deploy.bundle.bundle import Bundle
from chexnet_deploy.bundle.manifest import Dialect
from chexnet_deploy.bundle.probe import draw_probe_pixels
from chexnet_deploy.errors import ExportError
from chexnet_deploy.evaluation.spec import BatchProfile, BuildOptions, read_spec
from chexnet_deploy.export.from_torch.checkpoint import read_checkpoint
from chexnet_deploy.export.from_torch.to_onnx import trace
from chexnet_deploy.export.quantize import variants as forms
from chexnet_deploy.export.quantize.qdq import to_float16
from chexnet_deploy.export.tensorrt.compile import CompileOptions, compile_onnx
from chexnet_deploy.export.tensorrt.layers import (
    Layer,
    Tensor,
    bytes_per_image,
    conv_types,
    count_kernels,
    count_reformats,
    parse_inspector,
    parse_log,
)
from chexnet_deploy.images.preprocessing import Preprocessing
from chexnet_deploy.runtime.sessions.trt_versions import Family, open_tensorrt
from chexnet_deploy.terminal import cancellation

BATCH = BatchProfile(min=1, opt=4, max=8)
AMPERE = CompileOptions(read_spec("fp16").model_copy(update={"batch": BATCH}), compute_capability="8.0")


@pytest.fixture(scope="module")
def rtx() -> tuple[ModuleType, Family]:
    pytest.importorskip("tensorrt_rtx", reason="NOT RUN on TensorRT: pip install 'chexnet-deploy[rtx]'")
    return open_tensorrt("tensorrt_rtx")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("precision", "expected"),
    [
        ("fp32", {"float32": 121}),
        ("fp16", {"float16": 120, "float32": 1}),
        ("int8", {"int8": 121, "float16": -1, "float32": 1}),  # less those left in floating point
    ],
)
def test_each_convolution_runs_in_the_type_the_bundle_promises(
    rtx: tuple[ModuleType, Family], bundles: dict[str, Bundle], precision: str, expected: dict[str, int]
) -> None:
    bundle = bundles[precision]
    phases: list[str] = []
    compiled = compile_onnx(*rtx, bundle.read_model(), AMPERE, on_phase=lambda phase, done, total: phases.append(phase))
    if precision == "int8":
        n_left = len(bundle.manifest.float_convolutions)
        expected = {**expected, "int8": expected["int8"] - n_left, "float16": expected["float16"] + n_left}
    assert Counter(compiled.conv_types.values()) == expected
    if precision == "int8":
        in_float = {name for name, kind in compiled.conv_types.items() if kind != "int8"}
        assert in_float == set(bundle.manifest.float_convolutions)
    assert len(compiled.plan) > 1 << 20
    assert phases


@pytest.fixture(scope="module")
def single_64_px(checkpoint_path: Path) -> onnx.ModelProto:
    """The fp32 graph at the side that the traffic was first measured at; what it moves does not depend on its weights."""
    checkpoint = read_checkpoint(checkpoint_path)
    manifest = checkpoint.manifest.model_copy(update={"preprocessing": Preprocessing(resize_px=64)})
    return onnx.load_from_string(trace(replace(checkpoint, manifest=manifest)))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("form", "n_kernels", "megabytes", "expected"),
    [
        ("fp32", 189, 17.34, {"float32": 121}),
        ("fp16", 187, 7.27, {"float16": 120, "float32": 1}),
        ("typed", 232, 8.57, {"int8": 86, "float16": 34, "float32": 1}),
        ("mixed", 190, 5.94, {"int8": 44, "float16": 76, "float32": 1}),
    ],
)
def test_what_each_form_moves_at_64_px(
    rtx: tuple[ModuleType, Family],
    single_64_px: onnx.ModelProto,
    monkeypatch: pytest.MonkeyPatch,
    form: Literal["fp32", "fp16"] | Dialect,
    n_kernels: int,
    megabytes: float,
    expected: dict[str, int],
) -> None:
    # GPTQ takes long, and changes no byte that moves.
    monkeypatch.setattr(forms, "round_weights", lambda weights, *_, **__: np.ones(weights.shape, np.int8))
    model = single_64_px
    if form == "fp16":
        model = to_float16(model)
    elif form != "fp32":
        model = forms.prepare(model, form, draw_probe_pixels(64)[:8]).build()
    compiled = compile_onnx(*rtx, model.SerializeToString(), AMPERE)
    assert Counter(compiled.conv_types.values()) == expected
    traffic = bytes_per_image(compiled.layers)
    assert traffic is not None
    assert traffic <= megabytes * 1e6
    assert count_kernels(compiled.layers) <= n_kernels
    if form == "mixed":
        # One scale for a weight lets bias and ReLU into the int8 kernel, which then writes what the next one reads.
        in_int8 = [each for each in compiled.layers if each.inputs and each.inputs[0].type == "int8"]
        assert {tensor.type for each in in_int8 for tensor in each.outputs} == {"float16"}


@pytest.mark.slow
def test_a_tensorrt_that_tells_no_steps_has_one_phase(
    rtx: tuple[ModuleType, Family], bundles: dict[str, Bundle]
) -> None:
    trt, family = rtx
    phases: list[tuple[str, int, int]] = []
    silent = replace(family, has_progress_monitor=False)
    compile_onnx(trt, silent, bundles["fp32"].read_model(), AMPERE, on_phase=lambda *phase: phases.append(phase))
    assert [phase[1:] for phase in phases] == [(0, 1), (1, 1)]


def test_every_build_option_is_taken(rtx: tuple[ModuleType, Family], bundles: dict[str, Bundle]) -> None:
    build = BuildOptions(workspace_mib=64, optimization_level=1, hardware_compatibility="ampere_plus")
    options = replace(AMPERE, spec=AMPERE.spec.model_copy(update={"build": build}))
    first = compile_onnx(*rtx, bundles["fp16"].read_model(), options)
    again = compile_onnx(*rtx, bundles["fp16"].read_model(), replace(options, timing_cache=first.timing_cache))
    assert again.conv_types == first.conv_types


def test_a_node_tensorrt_does_not_know_is_named(rtx: tuple[ModuleType, Family]) -> None:
    node = helper.make_node("Nonsense", ["pixels"], ["logits"], "the_odd_one", domain="nowhere")
    pixels = helper.make_tensor_value_info("pixels", TensorProto.UINT8, ["N", 1, 32, 32])
    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["N", 14])
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("nowhere", 1)]
    model = helper.make_model(helper.make_graph([node], "g", [pixels], [logits]), opset_imports=opsets, ir_version=8)
    with pytest.raises(ExportError, match="node Nonsense the_odd_one"):
        compile_onnx(*rtx, model.SerializeToString(), AMPERE)


def test_bytes_that_are_no_model_are_refused(rtx: tuple[ModuleType, Family]) -> None:
    with pytest.raises(ExportError, match="can't parse"):
        compile_onnx(*rtx, b"not an ONNX file", AMPERE)


def test_a_gpu_it_does_not_compile_for_is_refused_by_name(
    rtx: tuple[ModuleType, Family], bundles: dict[str, Bundle]
) -> None:
    options = replace(AMPERE, compute_capability="9.0")
    with pytest.raises(ExportError, match=r"SM90.*SM80"):
        compile_onnx(*rtx, bundles["fp32"].read_model(), options)


def test_a_cancelled_build_gives_nothing(rtx: tuple[ModuleType, Family], bundles: dict[str, Bundle]) -> None:
    cancelled = threading.Event()
    with pytest.raises(ExportError, match="cancelled"):
        compile_onnx(
            *rtx,
            bundles["fp16"].read_model(),
            AMPERE,
            cancelled=cancelled,
            on_phase=lambda phase, done, total: cancelled.set(),
        )


def test_ctrl_c_ends_a_build(rtx: tuple[ModuleType, Family], bundles: dict[str, Bundle]) -> None:
    with pytest.raises(KeyboardInterrupt), cancellation() as cancelled:  # noqa: SIM117
        with pytest.raises(ExportError, match="cancelled"):
            compile_onnx(
                *rtx,
                bundles["int8"].read_model(),
                AMPERE,
                cancelled=cancelled,
                on_phase=lambda phase, done, total: signal.raise_signal(signal.SIGINT),
            )


LINE = (
    "Name: /a/Conv_myl0_2, LayerType: correlation, Inputs: [ { Name: x, Dimensions: [-1,4,64,64], Strides: [16384,1,256,4], "
    "Datatype: Int8, Format: (NHWC) Channel major format }, { Name: z, Dimensions: [-1,2,3], Datatype: Half }], "
    "Constants: [ { Name: w, Dimensions: [64,4,7,7], Datatype: Half }], "
    "Outputs: [ { Name: y, Dimensions: [-1,5], Datatype: Float, Format: (NHWC) }], TacticName: t, StreamId: 0, "
    "Metadata: [ONNX Layer: /a/Conv][ONNX Layer: /a/Relu]"
)
HELPER = "Name: s, LayerType: shape_call, Inputs: [], Constants: [], Outputs: [], TacticName: , StreamId: 0, Metadata: "
HALF = Tensor("float16", (-1, 8, 4, 4))


def layer(kind: str, origin: str, *inputs: Tensor) -> Layer:
    return Layer(origin, kind, inputs, (HALF,), (origin,))


def test_a_line_of_the_layer_table_by_hand() -> None:
    layers = parse_log(["something else", LINE, HELPER])
    inputs = (Tensor("int8", (-1, 4, 64, 64)), Tensor("float16", (-1, 2, 3)))
    outputs = (Tensor("float32", (-1, 5)),)
    assert layers == (
        Layer("/a/Conv_myl0_2", "correlation", inputs, outputs, ("/a/Conv", "/a/Relu")),
        Layer("s", "shape_call", (), (), ()),
    )
    assert conv_types(layers, ["/a/Conv"]) == {"/a/Conv": "int8"}
    assert count_kernels(layers) == 1
    assert bytes_per_image(layers) == 4 * 64 * 64 + 2 * 2 * 3 + 4 * 5


@pytest.mark.parametrize(
    ("prose", "kind", "width"),
    [
        ("Thirty-two wide channel vectorized row major Int8 format.", "int8", 1),
        ("Channel major FP16 format where channel % 8 == 0", "float16", 2),
        ("Half", "float16", 2),
        ("Row major linear FP32", "float32", 4),
        # The pixels' cast fused into the first convolution says nothing of the type it multiplies in.
        ("Row major linear UInt8 format", "unknown", 1),
        ("", "unknown", None),
    ],
)
def test_an_entry_of_the_inspector_by_hand(prose: str, kind: str, width: int | None) -> None:
    entry = {
        "Name": "/a/Conv + /a/Relu",
        "LayerType": "CaskConvolution",
        "Inputs": [{"Name": "x", "Dimensions": [8, 3, 2, 2], "Format/Datatype": prose}],
        "Outputs": [{"Name": "y", "Dimensions": [8, 5, 2, 2], "Format/Datatype": "Half"}],
        "Metadata": "[ONNX Layer: /a/Conv]\x1f[ONNX Layer: /a/Relu]",
    }
    copy = {**entry, "Name": "Reformatting CopyNode for Input Tensor 0 to /a/Conv", "LayerType": "Reformat"}
    layers = parse_inspector(json.dumps({"Layers": [copy, entry], "I/O Tensors": ["x"]}))
    assert count_reformats(layers) == 1
    assert conv_types(layers, ["/a/Conv"]) == {"/a/Conv": kind}
    assert bytes_per_image(layers) == (None if width is None else 2 * (width * 3 * 4 + 2 * 5 * 4))


@pytest.mark.parametrize(
    ("form", "types", "n_kernels", "n_reformats"),
    [
        ("fp16n", {"float16": 121}, 194, 3),  # the head too, before float32 was pinned as well
        # Nothing fuses the quantising of BatchNorm's output into it: a pass over memory before each int8 convolution.
        ("int8-trt8", {"int8": 119, "float16": 1, "float32": 1}, 254, 63),
    ],
)
def test_the_tables_of_two_engines_on_an_h200(
    form: str, types: dict[str, int], n_kernels: int, n_reformats: int
) -> None:
    packed = Path(__file__).parents[3] / "benchmarks" / "results" / f"gpu-h200-{form}.layers.json.gz"
    layers = parse_inspector(gzip.decompress(packed.read_bytes()).decode())
    convolutions = [
        name for layer in layers for name in layer.origins if name.endswith("/Conv") and "onv" in layer.kind
    ]
    assert Counter(conv_types(layers, convolutions).values()) == types
    assert (count_kernels(layers), count_reformats(layers)) == (n_kernels, n_reformats)
    assert bytes_per_image(layers) is None  # 8.6 was asked without shapes


def test_rows_without_their_parts_are_kept_and_nothing_is_guessed() -> None:
    rows = [
        "/a/Conv + /a/Relu",
        {"Name": "s", "LayerType": "shape_call"},
        {"Name": "/b/Conv", "LayerType": "CaskConvolution"},
    ]
    layers = parse_inspector(json.dumps({"Layers": rows}))
    assert conv_types(layers, ["/a/Conv", "/b/Conv"]) == {"/a/Conv": "unknown", "/b/Conv": "unknown"}
    assert count_kernels(layers) == 2
    assert bytes_per_image(layers) is None


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        ([layer("correlation", "/a/Conv", HALF)], "float16"),
        ([], "unknown"),
        ([layer("Myelin", "/a/Conv", HALF)], "unknown"),  # hidden in a block
        ([layer("kgen", "/a/Conv", HALF)], "unknown"),  # swallowed by a point-wise kernel
        ([layer("gemm", "/a/Conv", HALF), layer("CaskConvolution", "/a/Conv", HALF)], "float16"),
        ([layer("gemm", "/a/Conv", HALF), layer("CaskConvolution", "/a/Conv", Tensor("int8"))], "unknown"),
    ],
)
def test_a_convolution_has_a_type_only_where_the_table_says_one(layers: list[Layer], expected: str) -> None:
    assert conv_types(layers, ["/a/Conv"]) == {"/a/Conv": expected}


@pytest.mark.parametrize(
    "odd",
    [
        layer("kgen", "odd", Tensor("float16")),  # no dimensions
        layer("kgen", "odd", Tensor("float16", (-1, -1, 4, 4))),
        layer("kgen", "odd", Tensor("E8M0", (-1, 8, 4, 4))),
        layer("Myelin", "odd", HALF),  # many kernels in one row
    ],
)
def test_traffic_that_a_table_does_not_tell_is_no_number(odd: Layer) -> None:
    known = layer("kgen", "known", HALF)
    assert bytes_per_image([known]) == 2 * 2 * 8 * 4 * 4
    assert bytes_per_image([known, odd]) is None


def test_an_empty_table_leaves_all_unknown() -> None:
    for layers in (parse_log(["something else"]), parse_inspector(json.dumps({"Layers": []})), parse_inspector("{}")):
        assert layers == ()
        assert conv_types(layers, ["/a/Conv"]) == {"/a/Conv": "unknown"}
        assert bytes_per_image(layers) is None
