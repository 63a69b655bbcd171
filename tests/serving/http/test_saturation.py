"""What lies at the ends of int8 ranges is counted as it is, told in blocks, and never in the way."""

from collections.abc import Mapping
from time import monotonic, sleep

import numpy as np
import onnx
import pytest

from chexnet_deploy.bundle.bundle import Bundle
from chexnet_deploy.datasets.chestxray14 import ChestXray14
from chexnet_deploy.images.reader import read_image
from chexnet_deploy.runtime.sessions.activations import OrtActivations, with_outputs
from chexnet_deploy.runtime.sessions.ort import load_onnx
from chexnet_deploy.serving.http import saturation
from chexnet_deploy.serving.http.saturation import SaturationWatch, can_watch
from tests.serving.running import Start

DIALECTS = ("int8", "int8-cpu")


def activations(bundle: Bundle) -> tuple[str, ...]:
    assert bundle.manifest.calibration is not None
    return bundle.manifest.calibration.activations


def noise(n: int = 1) -> np.ndarray:
    """Black and white dots: like no radiograph."""
    return (np.random.default_rng(7).integers(0, 2, (n, 1, 32, 32)) * 255).astype(np.uint8)


@pytest.mark.parametrize("name", DIALECTS)
def test_outputs_added_to_the_bytes_are_the_graphs_own_tensors(bundles: dict[str, Bundle], name: str) -> None:
    content, names = bundles[name].read_model(), activations(bundles[name])
    assert len(names) > 80
    by_bytes = onnx.load_from_string(with_outputs(content, names))
    by_onnx = onnx.load_from_string(content)
    by_onnx.graph.output.extend(onnx.ValueInfoProto(name=tensor) for tensor in names)
    assert by_bytes == by_onnx
    plain, more = (load_onnx(model) for model in (content, with_outputs(content, names)))
    pixels = bundles[name].read_probe().pixels[:1]
    logits, beside_more = (session.run(["logits"], {"pixels": pixels})[0] for session in (plain, more))
    assert np.abs(logits - beside_more).max() < 0.05  # other nodes are fused, and an int8 step may fall the other way


@pytest.mark.parametrize("name", DIALECTS)
def test_images_like_the_calibrations_hardly_saturate_and_others_do(
    bundles: dict[str, Bundle], phantom: ChestXray14, name: str
) -> None:
    bundle = bundles[name]
    inside = OrtActivations(bundle.read_model(), activations(bundle))
    preprocessing = bundle.manifest.preprocessing
    paths = [radiograph.path for radiograph in phantom.split("test")[:20]]
    usual = np.concatenate([preprocessing(read_image(path)) for path in paths if path is not None])
    usual = usual.reshape(-1, 1, 32, 32)
    like, unlike = inside.saturated_shares(usual), inside.saturated_shares(noise(8))
    assert like.shape == (len(activations(bundle)),)
    assert like.max() < 0.01
    assert unlike.max() > 3.0 * max(like.max(), 1e-4)


def test_a_block_is_told_as_its_mean(bundles: dict[str, Bundle]) -> None:
    told = list[Mapping[str, float]]()
    watch = SaturationWatch(bundles["int8-cpu"], 1e-6, told.append)
    end_s = monotonic() + 60.0
    while not told and monotonic() < end_s:
        watch.offer(noise())
        sleep(0.001)
    watch.close()
    names = activations(bundles["int8-cpu"])
    one = OrtActivations(bundles["int8-cpu"].read_model(), names).saturated_shares(noise())
    assert list(told[0]) == list(names)
    assert np.allclose(list(told[0].values()), one)


def test_an_image_is_looked_at_only_when_it_is_time(
    bundles: dict[str, Bundle], monkeypatch: pytest.MonkeyPatch
) -> None:
    looked = list[int]()
    monkeypatch.setattr(SaturationWatch, "_look", lambda self, pixels: looked.append(len(pixels)))
    watch = SaturationWatch(bundles["int8"], 3600.0, lambda shares: None)
    for _ in range(3):
        watch.offer(noise(4))
    watch.close()
    assert looked == [1]


def test_a_watch_that_fails_says_so_once_and_stops(
    bundles: dict[str, Bundle], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tried = list[int]()

    def fail(self: OrtActivations, pixels: np.ndarray) -> None:
        tried.append(1)
        raise RuntimeError("DOE^JANE")

    monkeypatch.setattr(OrtActivations, "saturated_shares", fail)
    watch = SaturationWatch(bundles["int8-cpu"], 1e-6, lambda shares: None)
    watch.offer(noise())
    end_s = monotonic() + 60.0
    while not caplog.records and monotonic() < end_s:
        sleep(0.01)
    sleep(0.05)
    watch.offer(noise())
    watch.close()
    assert tried == [1]
    assert [record.getMessage() for record in caplog.records] == [
        "int8 saturation isn't watched any more: RuntimeError"
    ]


def test_only_int8_in_onnx_is_watched(bundles: dict[str, Bundle], monkeypatch: pytest.MonkeyPatch) -> None:
    assert {name: can_watch(bundle) for name, bundle in bundles.items()} == {
        "fp32": False,
        "fp16": False,
        "int8": True,
        "int8-cpu": True,
    }
    monkeypatch.setattr(saturation.importlib.util, "find_spec", lambda name: None)
    assert not can_watch(bundles["int8"])


def test_a_service_tells_it(start: Start, served: Bundle, radiograph: bytes) -> None:
    service = start(served.path, "--provider", "cpu", "--saturation-s", "0.0001")
    end_s = monotonic() + 60.0
    while b"chexnet_int8_saturated_share{" not in service.ask("GET", "/metrics")[2]:
        assert monotonic() < end_s
        assert service.ask("POST", "/predict", radiograph)[0] == 200
    text = service.ask("GET", "/metrics")[2].decode()
    assert text.count("chexnet_int8_saturated_share{") == len(activations(served))
    assert service.stop() == 0
