"""The page says what the report says, and needs nothing but itself."""

import re
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.rigs.plan_card import TARGET
from chexnet_deploy.bundle.bundle import Bundle
from chexnet_deploy.bundle.manifest import EngineCard
from chexnet_deploy.datasets.chestxray14 import ChestXray14
from chexnet_deploy.datasets.labelled import LabelledImages
from chexnet_deploy.evaluation.bench_report import BenchRun
from chexnet_deploy.evaluation.engines import Effort, run_bench
from chexnet_deploy.evaluation.pages.bench_page import N_CAM_PICTURES, write_html
from chexnet_deploy.evaluation.spec import read_spec
from chexnet_deploy.runtime.predictor import Predictor


@pytest.fixture(scope="module")
def run(bundles: dict[str, Bundle], phantom: ChestXray14) -> BenchRun:
    images = LabelledImages.of(phantom.split("test"), bundles["fp32"].manifest.findings)
    engines = [(bundles[name], read_spec(name)) for name in ("fp16", "int8")]
    effort = Effort(min_runs=3, min_duration_s=0.0)
    return run_bench(engines, bundles["fp32"], images, data="40 <patients>", effort=effort)


def page_of(run: BenchRun, bundles: dict[str, Bundle], path: Path) -> str:
    with Predictor.open(bundles["int8"].path, provider="cpu") as predictor:
        write_html(path, run, predictor)
    return path.read_text()


def test_every_finding_and_limit_is_on_the_page(run: BenchRun, bundles: dict[str, Bundle], tmp_path: Path) -> None:
    page = page_of(run, bundles, tmp_path / "report.html")
    for finding in run.report.findings:
        assert page.count(f"<td>{finding}</td>") == 4  # in two tables an engine
    assert run.report.verdict in page
    for engine in run.report.engines:
        assert engine.parity is not None
        for each in engine.parity.gates:
            assert f"<td>{each.measured}</td>\n<td>{each.limit}</td>" in page
    assert bundles["int8"].id[:16] in page
    assert "40 &lt;patients&gt;" in page  # what users name is escaped
    assert (
        len(re.findall(r'src="data:image/(?:png|jpeg);base64,', page)) == 4 + N_CAM_PICTURES
    )  # ROC, latency and a forest plot an engine
    assert not re.search(r'(?:src|href)="(?!data:)', page)  # nothing is fetched


def test_a_plan_shows_its_card(run: BenchRun, bundles: dict[str, Bundle], tmp_path: Path) -> None:
    card = EngineCard(
        build_s=61.25,
        plan_bytes=9 << 20,
        batch=(1, 8, 32),
        conv_types={"int8": 119},
        fallbacks=("/features/conv0/Conv", "/Conv"),
        n_reformats=3,
        activation_bytes=40 << 20,
        n_kernels=187,
        bytes_per_image=9_820_000,
        warnings=("careful",),
    )
    engines = (run.report.engines[0], run.report.engines[1].model_copy(update={"target": TARGET, "card": card}))
    page = page_of(
        replace(run, report=run.report.model_copy(update={"engines": engines})), bundles, tmp_path / "x.html"
    )
    words = " ".join(page.split())
    assert "Plan for NVIDIA L4 (compute capability 8.9), tensorrt 10.3.0, driver's CUDA 12.4" in words
    assert "built in 61.2 s, 9.0 MiB, 187 kernels, 9.82 MB moved an image, batch 1 / 8 / 32, 3 reformats," in words
    assert "3 reformats, 40.0 MiB of activations a lane." in words
    assert "Not in int8: /features/conv0/Conv, /Conv. TensorRT warned: careful." in words
