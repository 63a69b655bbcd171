"""What others make of the same fp32 graph and the same calibration images: ONNX Runtime's, NNCF's and ModelOpt's int8.

Each recipe as its own documentation has it; nothing is tuned against it. For quantisers.py and benchmarks/cpu/peers.py.
"""

import os
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import openvino
from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process

from chexnet_deploy.export.quantize.variants import Calibrated
from chexnet_deploy.images.preprocessing import Pixels
from chexnet_deploy.runtime.sessions.base import Logits

Answer: TypeAlias = Callable[[Pixels], Logits]
OrtMethod: TypeAlias = Literal["MinMax", "Entropy", "Percentile"]
NncfPreset: TypeAlias = Literal["PERFORMANCE", "MIXED"]

# What ONNX Runtime's calibrators keep of all tensors before they look at it; without a limit, of all images: 25 GB at 224 px. The
# number of images must be a multiple. Not CalibMaxIntermediateOutputs: its min-max forgets what it has kept, unseen (1.32).
_IMAGES_AT_ONCE = 4
_MODELOPT_PROGRAM = Path(__file__).with_name("run_modelopt.py")
_MODELOPT_DEADLINE_S = 1800


def ort_default(model: bytes, pixels: Pixels) -> bytes:
    """Return `quantize_static` with all its defaults, after `quant_pre_process`, as ONNX Runtime's documentation advises."""
    return _quantize_static(model, pixels, {})


def ort_convolutions(model: bytes, pixels: Pixels, method: OrtMethod) -> bytes:
    """Return `quantize_static` of the convolutions alone, weights per channel."""
    settings = {
        "op_types_to_quantize": ["Conv"],
        "per_channel": True,
        "calibrate_method": CalibrationMethod[method],
        "extra_options": {"CalibStridedMinMax": _IMAGES_AT_ONCE},
    }
    return _quantize_static(model, pixels, settings)


def nncf_int8(model: bytes, pixels: Pixels, preset: NncfPreset, *, has_fast_bias_correction: bool) -> Any:
    """Return the openvino.Model that NNCF makes, for one image at a time.

    A batch dimension left open would be answered wrongly where NNCF runs it to correct biases.
    """
    # NNCF reports what it quantises to its maker unless it believes to be tested by them; the other way,
    # `opt_in_out --opt_out`, is a file in the user's home.
    os.environ.setdefault("NNCF_CI", "1")
    import nncf

    single = openvino.Core().read_model(model)
    single.reshape([1, 1, *pixels.shape[2:]])
    return nncf.quantize(
        single,
        nncf.Dataset([image[None] for image in pixels]),
        preset=nncf.QuantizationPreset[preset],
        subset_size=len(pixels),
        fast_bias_correction=has_fast_bias_correction,
    )


def modelopt_int8(model: bytes, pixels: Pixels, method: Literal["max", "entropy"], interpreter: Path) -> bytes:
    """Return ModelOpt's int8, made in an environment of its own: it needs another onnx than this project.

    Raises:
        RecipeError: it failed; the last line of what it said.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "model.onnx").write_bytes(model)
        np.save(folder / "pixels.npy", pixels)
        done = subprocess.run(
            [str(interpreter), str(_MODELOPT_PROGRAM), "model.onnx", "pixels.npy", method, "int8.onnx"],
            cwd=folder,
            env={key: value for key, value in os.environ.items() if key != "PYTHONPATH"},
            capture_output=True,
            text=True,
            timeout=_MODELOPT_DEADLINE_S,
        )
        if done.returncode or not (folder / "int8.onnx").exists():
            said = (done.stderr or done.stdout).strip().splitlines() or ["it said nothing"]
            raise RecipeError(f"ModelOpt failed: {said[-1]}")
        return (folder / "int8.onnx").read_bytes()


class RecipeError(Exception):
    """Another's tool failed: what it said is the result."""


class StaticOpenvino:
    """A model in OpenVINO with a fixed batch, cut into pieces that run on streams side by side.

    Args:
        model: ONNX bytes, or an openvino.Model, which is left as it is.
        resize_px: side of the pixels.
        batch: images in one call; fewer are filled up.
        piece: images of one request, a divisor of `batch`; None leaves the batch dimension open, which OpenVINO answers wrongly for
            some int8 graphs.
        streams: requests that run at the same time; one has all threads.
    """

    def __init__(
        self, model: bytes | Any, resize_px: int, *, batch: int, piece: int | None, streams: int, threads: int
    ) -> None:
        core = openvino.Core()
        own = core.read_model(model) if isinstance(model, bytes) else model.clone()
        own.reshape([-1 if piece is None else piece, 1, resize_px, resize_px])
        settings = {
            "PERFORMANCE_HINT": "LATENCY" if streams == 1 else "THROUGHPUT",
            "INFERENCE_NUM_THREADS": threads,
            "NUM_STREAMS": streams,
            "INFERENCE_PRECISION_HINT": "f32",
        }
        compiled = core.compile_model(own, "CPU", settings)
        self._batch, self._piece = batch, piece or batch
        self._requests = [compiled.create_infer_request() for _ in range(batch // self._piece)]

    def run(self, pixels: Pixels) -> Logits:
        """Return logits of exactly `batch` images."""
        for i, request in enumerate(self._requests):
            part = pixels[i * self._piece : (i + 1) * self._piece]
            request.start_async({0: part}, share_inputs=True)
        for request in self._requests:
            request.wait()
        return np.concatenate([request.get_output_tensor(0).data for request in self._requests])

    def answer(self, pixels: Pixels) -> Logits:
        """Return logits of any number of images."""
        parts = []
        for start in range(0, len(pixels), self._batch):
            part = pixels[start : start + self._batch]
            filled = np.concatenate([part, np.repeat(part[-1:], self._batch - len(part), axis=0)])
            parts.append(self.run(filled)[: len(part)])
        return np.concatenate(parts)


class _Reader(CalibrationDataReader):  # type: ignore[misc]
    """Hands ONNX Runtime one image after another, of all or of a range."""

    def __init__(self, pixels: Pixels) -> None:
        self._pixels = pixels
        self._images: Iterator[Pixels] = iter(pixels)

    def __len__(self) -> int:
        return len(self._pixels)

    def set_range(self, start_index: int, end_index: int) -> None:
        self._images = iter(self._pixels[start_index:end_index])

    def get_next(self) -> dict[str, Pixels] | None:
        image = next(self._images, None)
        return None if image is None else {"pixels": image[None]}


def _quantize_static(model: bytes, pixels: Pixels, settings: dict[str, Any]) -> bytes:
    with tempfile.TemporaryDirectory() as name:
        source, prepared, out = (Path(name) / each for each in ("model.onnx", "prepared.onnx", "int8.onnx"))
        source.write_bytes(model)
        quant_pre_process(str(source), str(prepared))
        quantize_static(str(prepared), str(out), _Reader(pixels), **settings)
        return out.read_bytes()


def without_gptq(calibrated: Calibrated) -> Calibrated:
    """Return it as if no two inputs ever moved together: GPTQ then rounds each weight to the nearest."""
    moments = {name: np.eye(len(moment)) for name, moment in calibrated.seen.moments.items()}
    return replace(calibrated, seen=replace(calibrated.seen, moments=moments))


def without_equalising(calibrated: Calibrated) -> Calibrated:
    """Return it as if every channel of a tensor had shown the tensor's whole range."""
    seen = calibrated.seen
    highest = {name: np.maximum(seen.high[name], -seen.low[name]).max() for name in seen.high}
    high = {name: np.full_like(values, highest[name]) for name, values in seen.high.items()}
    low = {
        name: np.full_like(values, -highest[name] if (values < 0.0).any() else 0.0) for name, values in seen.low.items()
    }
    return replace(calibrated, seen=replace(seen, low=low, high=high))
