"""The page says what the report says, and needs nothing but itself."""

from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.rigs.plan_card import TARGET
from chexnet_deploy.bundle.bundle import Bundle
from chexnet_deploy.bundle.manifest import EngineCard
from chexnet_deploy.datasets.chestxray14 import ChestXray14
from chexnet_deploy.datasets.labelled import LabelledImages
from chexnet_deploy.evaluation.bench_report import BenchRun
from chexnet_deploy.evaluation.engines import N_SHOWN, Effort, run_bench
from chexnet_deploy.evaluation.pages.bench_page import write_html
from chexnet_deploy.evaluation.pages.charts import draw_margins, mark
from chexnet_deploy.evaluation.spec import read_spec
from tests.browser import Browser
from tests.html_page import assert_accessible, read_page


@pytest.fixture(scope="module")
def run(bundles: dict[str, Bundle], phantom: ChestXray14) -> BenchRun:
    images = LabelledImages.of(phantom.split("test"), bundles["fp32"].manifest.findings)
    engines = [(bundles[name], read_spec(name)) for name in ("fp16", "int8")]
    effort = Effort(min_runs=3, min_duration_s=0.0)
    return run_bench(engines, bundles["fp32"], images, data="40 <patients>", effort=effort)


def page_of(run: BenchRun, path: Path) -> str:
    write_html(path, run)
    return path.read_text()


def test_axe_finds_nothing_in_the_page(run: BenchRun, browser: Browser, tmp_path: Path) -> None:
    page_of(run, tmp_path / "report.html")
    browser.open((tmp_path / "report.html").as_uri())
    browser.run("document.querySelectorAll('details').forEach(each => each.open = true)")
    assert browser.violations() == []
    assert browser.complaints == []


def test_every_finding_and_limit_is_on_the_page(run: BenchRun, bundles: dict[str, Bundle], tmp_path: Path) -> None:
    page = page_of(run, tmp_path / "report.html")
    root = assert_accessible(page)
    for finding in run.report.findings:
        # In two tables an engine, and in the picture as a table.
        assert page.count(f'<th scope="row">{finding}</th>') == 5
    for engine in run.report.engines:
        assert engine.parity is not None
        for each in engine.parity.gates:
            assert f'<th scope="row">{each.gate}</th><td>{each.measured}</td>' in page
    assert bundles["int8"].id[:16] in page
    assert "40 &lt;patients&gt;" in page  # what users name is escaped
    # The radiograph, and its maps by the reference and both engines.
    assert len(root.find("img")) == N_SHOWN * 4
    assert len(page) < 300_000


def test_the_first_screen_says_what_may_replace_what(run: BenchRun, tmp_path: Path) -> None:
    root = read_page(page_of(run, tmp_path / "report.html"))
    # 40 patients are too few for 20 positive ones a finding.
    assert root.find("h1")[0].text == "INCONCLUSIVE Not decided: whether fp16 and int8 may replace the reference"
    header = " ".join(root.find("header")[0].text.split())
    assert "fp16 and int8: INCONCLUSIVE. no finding has 20 positive patients" in header
    assert "Next: Measure on more images: at least 20 patients with a finding are needed to judge it." in header
    sections = {section.find("h2")[0].text: section for section in root.find("section")}
    assert list(sections) == ["Speed beside accuracy", "AUROC difference in units of the margin", "Not measured"]
    assert [row.find("th")[0].text for row in sections["Speed beside accuracy"].find("tbody")[0].find("tr")] == [
        "fp16",
        "int8",
    ]
    missing = sections["Not measured"].text
    assert (
        "14 findings: too few patients: Atelectasis, Cardiomegaly, Effusion, Infiltration, Mass and 9 more." in missing
    )
    assert "Speed of fp16: its convolutions ran as float here." in missing
    # All details fold; open from the start are the maps alone.
    assert [fold.find("h2")[0].text for fold in root.find("details") if "open" in fold.attributes] == [
        "Where the engines look"
    ]


def test_the_picture_is_in_units_of_the_margin(run: BenchRun, tmp_path: Path) -> None:
    engine = run.report.engines[0]
    assert engine.parity is not None
    row = engine.parity.findings[0].model_copy(
        update={
            "auroc_reference": 0.75, "auroc_candidate": 0.7375, "difference_low": -0.025, "difference_high": 0.5,
            "margin": 0.0125, "verdict": "fail",
        }
    )  # fmt: skip
    parity = engine.parity.model_copy(update={"findings": (row,)})
    picture = draw_margins([engine.model_copy(update={"parity": parity})], {"fp16": 1})
    # From -2 to +2 margins: -0.0125 is -1, at a quarter of the width; the interval begins at the edge and leaves at the other.
    assert '<use href="#mark1" x="25.00%"' in picture
    assert '<line x1="0.00%" x2="100.00%"' in picture
    assert picture.count('class="arrow"') == 1
    assert f"{row.finding}, fp16: -0.0125 (-0.0250 to +0.5000), fail" in picture


def test_no_two_engines_have_the_same_mark() -> None:
    marks = [str(mark(i)) for i in range(36)]
    assert len(set(marks)) == 36


def test_the_references_own_file_is_one_line(run: BenchRun, tmp_path: Path) -> None:
    fp16, int8 = run.report.engines
    assert fp16.parity is not None
    parity = fp16.parity.model_copy(update={"max_abs_logit_difference": 0.0})
    own = fp16.model_copy(update={"verdict": "PASS", "parity": parity, "bundle_id": run.report.reference_id})
    report = run.report.model_copy(update={"engines": (own, int8)})
    root = assert_accessible(page_of(replace(run, report=report), tmp_path / "x.html"))
    assert "fp16: the same file as the reference, identical to the bit." in root.text
    assert "whether int8 may replace fp16" in root.find("h1")[0].text
    assert [fold for fold in root.find("summary") if fold.text.startswith("fp16")] == []


def test_speed_alone_has_a_page(run: BenchRun, tmp_path: Path) -> None:
    engines = tuple(engine.model_copy(update={"parity": None}) for engine in run.report.engines)
    report = run.report.model_copy(update={"engines": engines, "images_sha256": None})
    root = assert_accessible(page_of(BenchRun(report, None, {}), tmp_path / "x.html"))
    assert "No labelled images were given: only speed was measured." in root.find("header")[0].text
    assert "Next: Give labelled images by --data." in root.find("header")[0].text


def test_a_plan_shows_its_card(run: BenchRun, tmp_path: Path) -> None:
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
    page = page_of(replace(run, report=run.report.model_copy(update={"engines": engines})), tmp_path / "x.html")
    words = " ".join(page.split())
    assert "Plan for NVIDIA L4 (compute capability 8.9), tensorrt 10.3.0, driver's CUDA 12.4" in words
    assert "built in 61.2 s, 9.0 MiB, 187 kernels, 9.82 MB moved an image, batch 1 / 8 / 32, 3 reformats," in words
    assert "3 reformats, 40.0 MiB of activations a lane." in words
    assert "Not in int8: /features/conv0/Conv, /Conv. TensorRT warned: careful." in words
