"""The page in a real browser: a radiograph is chosen, findings and map appear, by keyboard too; nothing is fetched elsewhere."""

import itertools
import os
from importlib.resources import files
from pathlib import Path

import pytest

from benchmarks.rigs.node_rig import write_radiograph
from tests.browser import Browser
from tests.html_page import assert_accessible
from tests.serving.running import Running


def test_a_radiograph_gets_its_findings_and_its_map(
    browser: Browser, service: Running, radiograph: bytes, tmp_path: Path
) -> None:
    url = f"http://127.0.0.1:{service.port}"
    image = tmp_path / "radiograph.png"
    image.write_bytes(radiograph)
    expected = service.json("POST", "/predict", radiograph)
    engine = service.json("GET", "/engine")

    browser.open(url)
    browser.wait("document.querySelectorAll('#checks tr').length > 0")
    assert engine["bundle"] in browser.run("document.getElementById('facts').innerText")
    browser.choose_files("#file", image)
    browser.wait("document.getElementById('shown').naturalWidth > 0")
    shown = browser.run(
        "[...document.querySelectorAll('#findings button')].map(b => [b.dataset.finding, b.querySelector('.value').innerText])"
    )
    ranked = sorted(expected["probabilities"].items(), key=lambda item: -item[1])
    assert shown == [[name, f"{probability:.3f}"] for name, probability in ranked]
    points = browser.run("[...document.querySelectorAll('.point')].map(p => p.style.left)")
    assert len(points) == len(expected["operating_points"])

    # By keyboard alone: from the file field to the second finding, and its map.
    browser.run("document.getElementById('file').focus()")
    wanted = ranked[1][0]
    for _ in range(10):
        browser.press("Tab")
        if browser.run("document.activeElement.dataset.finding || ''") == wanted:
            break
    browser.press("Enter")
    browser.wait(f"document.getElementById('caption').innerText.includes({wanted.replace('_', ' ')!r})")
    assert browser.run("document.querySelector('#findings [aria-pressed=true]').dataset.finding") == wanted
    if "SCREENSHOTS" in os.environ:
        browser.screenshot(Path(os.environ["SCREENSHOTS"]) / "page.png")

    assert browser.violations() == []

    other = tmp_path / "text.png"
    other.write_bytes(b"no image")
    browser.choose_files("#file", other)
    browser.run("document.querySelectorAll('#files button')[0].click()")
    browser.wait("document.querySelectorAll('#files button')[1].innerText.includes('(unreadable)')")
    browser.run("document.querySelectorAll('#files button')[1].click()")
    browser.wait("document.getElementById('status').innerText.startsWith('text.png: ')")
    browser.wait("document.getElementById('status').innerText.includes('(unreadable)')")
    assert all(asked.startswith((url, "data:", "blob:")) for asked in browser.requests)
    # The refusal of the last file, which the browser notes by itself, and nothing else.
    assert all("422" in each for each in browser.complaints), browser.complaints


def test_several_files_are_read_one_after_another_with_their_names(
    browser: Browser, service: Running, radiograph: bytes, tmp_path: Path
) -> None:
    names = ["first.png", "broken.png", "third.dcm"]
    (tmp_path / names[0]).write_bytes(radiograph)
    (tmp_path / names[1]).write_bytes(b"no image")
    write_radiograph(tmp_path / names[2], seed=7)
    browser.open(f"http://127.0.0.1:{service.port}")
    browser.choose_files("#file", *(tmp_path / name for name in names))
    browser.wait("[...document.querySelectorAll('#files .verdict')].every(e => !/waits|Asking/.test(e.innerText))")
    rows = browser.run(
        "[...document.querySelectorAll('#files button')].map(e => [...e.children].map(c => c.innerText))"
    )
    assert [name for name, _ in rows] == names
    assert [text.split(" findings ")[-1] for _, text in rows[::2]] == ["at or above their operating points"] * 2
    assert "(unreadable)" in rows[1][1]
    # One question at a time: each answer came before the next file was sent.
    sent = browser.run(
        "performance.getEntriesByType('resource').filter(e => e.name.endsWith('/predict')).map(e => [e.startTime, e.responseEnd])"
    )
    assert len(sent) == 3
    assert all(before[1] <= after[0] for before, after in itertools.pairwise(sent))

    # The DICOM file is shown with a map, and without one.
    browser.run("document.querySelectorAll('#files button')[2].click()")
    browser.wait(
        "document.getElementById('caption').innerText.startsWith('third.dcm: ') && !document.getElementById('plain').hidden"
    )
    with_map = browser.run("document.getElementById('shown').src")
    browser.run("document.getElementById('plain').click()")
    assert (
        browser.run("document.getElementById('caption').innerText") == "third.dcm: the radiograph as the model read it"
    )
    browser.wait("document.getElementById('shown').naturalWidth == 96")
    assert browser.run("document.getElementById('shown').src") != with_map
    if "SCREENSHOTS" in os.environ:
        browser.screenshot(Path(os.environ["SCREENSHOTS"]) / "several.png")

    assert browser.violations() == []
    # Whatever is scrolled to, it says that it is no diagnosis.
    browser.run("scrollTo(0, document.body.scrollHeight)")
    assert browser.run("document.querySelector('header strong').innerText") == "For research; not a diagnosis."
    assert browser.run("document.querySelector('header strong').getBoundingClientRect().top") >= 0


def test_the_description_of_the_api_is_shown_offline(browser: Browser, service: Running) -> None:
    url = f"http://127.0.0.1:{service.port}"
    browser.open(f"{url}/docs")
    browser.wait("document.querySelectorAll('details').length >= 12")
    assert "/predict" in browser.run("document.body.innerText")
    assert browser.violations() == []
    if "SCREENSHOTS" in os.environ:
        browser.screenshot(Path(os.environ["SCREENSHOTS"]) / "docs.png")
    assert all(asked.startswith((url, "data:")) for asked in browser.requests)
    assert browser.complaints == []


@pytest.mark.parametrize("name", ["index.html", "docs.html"])
def test_every_part_of_a_page_has_its_name(name: str) -> None:
    page = files("chexnet_deploy.serving.http").joinpath("page").joinpath(name).read_text()
    root = assert_accessible(page)
    if name == "index.html":
        assert "not a diagnosis" in root.find("header")[0].text
        assert "multiple" in root.find("input")[0].attributes
