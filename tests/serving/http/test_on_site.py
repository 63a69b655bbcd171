"""A site file decides what the service answers; wrong known answers take it out of readiness."""

import asyncio
import json
import shutil
from pathlib import Path
from unittest import mock

import pytest

from chexnet_deploy.bundle.bundle import Bundle
from chexnet_deploy.bundle.site import Evidence, Site, SitePoint, site_path
from chexnet_deploy.errors import SessionError
from chexnet_deploy.serving.http.config import ServeConfig
from chexnet_deploy.serving.http.inference import live, ready
from chexnet_deploy.serving.http.pages import engine
from chexnet_deploy.serving.http.predict import _describe
from chexnet_deploy.serving.http.service import Service


def write_site(bundle: Bundle, present_at: float, absent_below: float) -> Site:
    finding = bundle.manifest.findings[0]
    point = SitePoint(
        present_at=present_at,
        absent_below=absent_below,
        guaranteed={"ppv": Evidence(n_patients=100, n_wrong=3)},
        sensitivity=None,
        specificity=None,
        undetermined=0.5,
    )
    site = Site(
        bundle=bundle.id,
        asked={"ppv": 0.9},
        confidence=0.95,
        points={finding: point},
        without={},
        data="",
        patients_note=(),
        n_images=1,
        n_patients=1,
        n_refused=0,
        inputs_sha256={},
        backend="cpu",
        made_utc="",
        tools={},
    )
    site_path(bundle.path).write_bytes(site.to_json())
    return site


@pytest.fixture
def copy(served: Bundle, tmp_path: Path) -> Bundle:
    shutil.copytree(served.path, tmp_path / "bundle")
    return Bundle.open(tmp_path / "bundle")


def test_answers_and_engine_name_the_site_and_a_new_one_is_taken_by_a_swap(copy: Bundle) -> None:
    first = write_site(copy, 0.9, 0.1)
    finding = copy.manifest.findings[0]

    async def run() -> None:
        service = Service(ServeConfig(copy.path, provider="cpu", self_test_s=0.0))
        await service.start()
        with service.use_engine() as running:
            logits = copy.read_probe().logits[0]
            logits[0] = 0.0  # probability 0.5, between the two
            answer = _describe(running, logits, "chexnet")
        assert answer["present"] == {}
        assert answer["operating_points"] == {finding: 0.9}
        assert answer["absent_below"] == {finding: 0.1}
        assert answer["operating_points_from"] == first.in_words
        facts = json.loads((await engine(service, None)).body)  # type: ignore[arg-type]
        assert facts["site"] == first.id
        assert f'site="{first.id}"'.encode() in service.metrics_text()
        assert not await service.swap()  # the same
        second = write_site(copy, 0.4, 0.1)
        assert await service.swap()
        with service.use_engine() as running:
            assert _describe(running, logits, "chexnet")["present"] == {finding: True}
        assert f'site="{second.id}"'.encode() in service.metrics_text()
        site_path(copy.path).write_bytes(b"{}")
        assert not await service.swap()  # refused; the second goes on
        assert f'site="{second.id}"'.encode() in service.metrics_text()
        await service.close()

    asyncio.run(run())


def test_wrong_known_answers_take_it_out_of_readiness(copy: Bundle) -> None:
    async def run() -> None:
        service = Service(ServeConfig(copy.path, provider="cpu", self_test_s=0.05))
        assert json.loads((await ready(service, None)).body) == {"ready": False, "reason": "starting"}  # type: ignore[arg-type]
        await service.start()
        assert (await ready(service, None)).status_code == 200  # type: ignore[arg-type]
        shutil.rmtree(copy.path)  # a bundle replaced in its place is no fault of the one that runs
        await asyncio.sleep(0.5)
        assert service.is_ready
        assert b'chexnet_known_answers_total{result="wrong"} 0.0' in service.metrics_text()
        assert b'chexnet_known_answers_total{result="right"} 0.0' not in service.metrics_text()
        with mock.patch(
            "chexnet_deploy.serving.http.loaded_model.check_known_answers", side_effect=SessionError("they differ")
        ):
            for _ in range(600):
                if not service.is_ready:
                    break
                await asyncio.sleep(0.05)
            for route, name in ((ready, "ready"), (live, "live")):
                answer = await route(service, None)  # type: ignore[arg-type]
                assert answer.status_code == 503
                assert json.loads(answer.body) == {name: False, "reason": "known-answers"}
            assert b"chexnet_ready 0.0" in service.metrics_text()
            assert b'chexnet_known_answers_total{result="wrong"} 0.0' not in service.metrics_text()
        await service.close()

    asyncio.run(run())
