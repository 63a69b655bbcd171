"""The page in a real browser: a radiograph is chosen, findings and map appear, by keyboard too; nothing is fetched elsewhere."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.serving.browser import Browser
from tests.serving.running import Running


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Browser]:
    program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if program is None:
        reason = "NOT RUN in a browser: install chromium"
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    opened = Browser(program, tmp_path / "profile")
    yield opened
    opened.close()


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
    browser.choose_file("#file", image)
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
    assert browser.run("document.querySelector('[aria-pressed=true]').dataset.finding") == wanted
    if "SCREENSHOTS" in os.environ:
        browser.screenshot(Path(os.environ["SCREENSHOTS"]) / "page.png")

    other = tmp_path / "text.png"
    other.write_bytes(b"no image")
    browser.choose_file("#file", other)
    browser.wait("document.getElementById('status').innerText.includes('(unreadable)')")
    assert all(asked.startswith((url, "data:", "blob:")) for asked in browser.requests)
    # The refusal of the last file, which the browser notes by itself, and nothing else.
    assert all('"status of 422' in each or "422" in each for each in browser.complaints), browser.complaints


def test_the_description_of_the_api_is_shown_offline(browser: Browser, service: Running) -> None:
    url = f"http://127.0.0.1:{service.port}"
    browser.open(f"{url}/docs")
    browser.wait("document.querySelectorAll('details').length >= 12")
    assert "/predict" in browser.run("document.body.innerText")
    if "SCREENSHOTS" in os.environ:
        browser.screenshot(Path(os.environ["SCREENSHOTS"]) / "docs.png")
    assert all(asked.startswith((url, "data:")) for asked in browser.requests)
    assert browser.complaints == []
