"""SIGHUP: another bundle takes over if it proves itself; whatever else, the running one goes on without a missed answer."""

import asyncio
import base64
import shutil
import signal
import threading
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from chexnet_deploy.bundle.bundle import Bundle
from chexnet_deploy.bundle.signing.keys import public_der
from chexnet_deploy.bundle.signing.releases import Release, read_floor
from chexnet_deploy.bundle.signing.sign import admit_first, sign_bundle
from chexnet_deploy.bundle.signing.trust import Trust
from chexnet_deploy.serving.http.config import ServeConfig
from chexnet_deploy.serving.http.service import Service
from tests.serving.running import Start

pytestmark = pytest.mark.slow


def point(link: Path, bundle: Path) -> None:
    """Make a link name another bundle in one step."""
    fresh = link.with_name("fresh")
    fresh.symlink_to(bundle)
    fresh.replace(link)


def test_another_bundle_takes_over_and_nobody_misses_an_answer(
    start: Start, bundles: dict[str, Bundle], radiograph: bytes, tmp_path: Path
) -> None:
    link = tmp_path / "bundle"
    link.symlink_to(bundles["fp32"].path)
    service = start(link, "--swap-tolerance", "0.2")
    is_over, statuses, ids = threading.Event(), list[int](), set[str]()

    def ask() -> None:
        while not is_over.is_set():
            answer = service.json("POST", "/predict", radiograph)
            statuses.append(answer["status"])
            ids.add(answer["bundle"])

    asking = threading.Thread(target=ask)
    asking.start()
    try:
        point(link, bundles["int8-cpu"].path)
        service.process.send_signal(signal.SIGHUP)
        service.wait_for_log("took over from")
        service.process.send_signal(signal.SIGHUP)
        service.wait_for_log("runs already")
        # Damaged: refused before a backend sees it.
        damaged = tmp_path / "damaged"
        shutil.copytree(bundles["fp32"].path, damaged)
        (damaged / "model.onnx").write_bytes(b"x")
        point(link, damaged)
        service.process.send_signal(signal.SIGHUP)
        service.wait_for_log("swap refused, .* does not match its manifest")
        # Gone altogether.
        link.unlink()
        service.process.send_signal(signal.SIGHUP)
        service.wait_for_log("swap refused, .* is no bundle")
    finally:
        is_over.set()
        asking.join()
    assert set(statuses) == {200}
    assert ids == {bundles["fp32"].id, bundles["int8-cpu"].id}
    assert service.json("GET", "/engine")["bundle"] == bundles["int8-cpu"].id
    assert service.metric('chexnet_swaps_total{result="refused"}') == 2.0
    assert service.stop() == 0


def test_one_that_answers_otherwise_is_refused(start: Start, bundles: dict[str, Bundle], tmp_path: Path) -> None:
    link = tmp_path / "bundle"
    link.symlink_to(bundles["fp32"].path)
    service = start(link, "--swap-tolerance", "0")
    point(link, bundles["int8-cpu"].path)
    service.process.send_signal(signal.SIGHUP)
    service.wait_for_log("swap refused, .* differ by up to .* on 32 images")
    assert service.json("GET", "/engine")["bundle"] == bundles["fp32"].id


def test_only_a_release_that_took_over_raises_the_floor(bundles: dict[str, Bundle], tmp_path: Path) -> None:
    key = Ed25519PrivateKey.from_private_bytes(bytes(32))
    for number, name in ((1, "fp32"), (2, "int8-cpu")):
        source = bundles[name]
        manifest = source.manifest.model_copy(update={"release": Release(line="adult", number=number)})
        Bundle.write(tmp_path / name, manifest, source.read_model(), source.read_probe_bytes())
        sign_bundle(tmp_path / name, key)
    public = base64.b64encode(public_der(key)).decode()
    lines = f'line = "adult"\nfloor_file = "floor.json"\n[[keys]]\nname = "release"\npublic_key = "{public}"\n'
    trust, floor, link = tmp_path / "trust.toml", tmp_path / "floor.json", tmp_path / "bundle"
    trust.write_text(lines)
    admit_first(tmp_path / "fp32", Trust.read(trust))
    link.symlink_to(tmp_path / "fp32")

    async def swap(tolerance: float) -> bool:
        service = Service(ServeConfig(link, trust=trust, swap_tolerance=tolerance))
        await service.start()
        point(link, tmp_path / "int8-cpu")
        has_swapped = await service.swap()
        await service.close()
        point(link, tmp_path / "fp32")
        return has_swapped

    assert not asyncio.run(swap(0.0))
    assert read_floor(floor).number == 1  # the running release may start again
    assert asyncio.run(swap(0.2))
    assert read_floor(floor).number == 2
