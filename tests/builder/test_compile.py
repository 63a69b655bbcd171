"""TensorRT for RTX really compiles what this package exports; it needs no GPU for that."""

import json
import signal
import threading
from collections import Counter
from dataclasses import replace
from types import ModuleType

import pytest
from onnx import TensorProto, helper

from chexnet_deploy.builder.compile import CompileOptions, compile_onnx
from chexnet_deploy.builder.layers import Layer, conv_types, count_reformats, parse_inspector, parse_log
from chexnet_deploy.bundle import Bundle
from chexnet_deploy.errors import ExportError
from chexnet_deploy.sessions.tensorrt_versions import Family, open_tensorrt
from chexnet_deploy.spec import BatchProfile, BuildOptions, read_spec
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
        ("int8", {"int8": 119, "float16": 1, "float32": 1}),
    ],
)
def test_each_convolution_runs_in_the_type_the_bundle_promises(
    rtx: tuple[ModuleType, Family], bundles: dict[str, Bundle], precision: str, expected: dict[str, int]
) -> None:
    bundle = bundles[precision]
    phases: list[str] = []
    compiled = compile_onnx(*rtx, bundle.read_model(), AMPERE, on_phase=lambda phase, done, total: phases.append(phase))
    assert Counter(compiled.conv_types.values()) == expected
    if precision == "int8":
        in_float = {name for name, kind in compiled.conv_types.items() if kind != "int8"}
        assert in_float == set(bundle.manifest.float_convolutions)
    assert len(compiled.plan) > 1 << 20
    assert phases


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
    "Name: /a/Conv_myl0_2, LayerType: correlation, Inputs: [ { Name: x, Dimensions: [-1,4,64,64], Datatype: Int8, "
    "Format: (NHWC) Channel major format }], Constants: [ { Name: w, Dimensions: [64,4,7,7], Datatype: Half }], "
    "Outputs: [ { Name: y, Datatype: Float, Format: (NHWC) }], TacticName: t, StreamId: 0, "
    "Metadata: [ONNX Layer: /a/Conv][ONNX Layer: /a/Relu]"
)


def test_a_line_of_the_layer_table_by_hand() -> None:
    assert parse_log(["something else", LINE]) == (
        Layer("/a/Conv_myl0_2", "correlation", ("int8",), ("float32",), ("/a/Conv", "/a/Relu")),
    )
    assert conv_types(parse_log([LINE]), ["/a/Conv"]) == {"/a/Conv": "int8"}


@pytest.mark.parametrize(
    ("prose", "kind"),
    [
        ("Thirty-two wide channel vectorized row major Int8 format.", "int8"),
        ("Channel major FP16 format where channel % 8 == 0", "float16"),
        ("Half", "float16"),
        ("Row major linear FP32", "float32"),
    ],
)
def test_an_entry_of_the_inspector_by_hand(prose: str, kind: str) -> None:
    entry = {
        "Name": "/a/Conv + /a/Relu",
        "LayerType": "CaskConvolution",
        "Inputs": [{"Name": "x", "Format/Datatype": prose}],
        "Outputs": [{"Name": "y", "Format/Datatype": "Half"}],
        "Metadata": "[ONNX Layer: /a/Conv]\x1f[ONNX Layer: /a/Relu]",
    }
    copy = {**entry, "Name": "Reformatting CopyNode for Input Tensor 0 to /a/Conv", "LayerType": "Reformat"}
    layers = parse_inspector(json.dumps({"Layers": [copy, entry]}))
    assert count_reformats(layers) == 1
    assert conv_types(layers, ["/a/Conv"]) == {"/a/Conv": kind}


def test_names_alone_are_no_layer_table() -> None:
    with pytest.raises(ExportError, match="names alone"):
        parse_inspector(json.dumps({"Layers": ["/a/Conv + /a/Relu"]}))


def test_an_unknown_engine_is_not_trusted() -> None:
    with pytest.raises(ExportError, match="no layer table"):
        parse_log(["something else"])
    with pytest.raises(ExportError, match="/b/Conv"):
        conv_types(parse_log([LINE]), ["/a/Conv", "/b/Conv"])
