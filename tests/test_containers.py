"""Images install what the pages say, of files that are enough for it, and say that nobody has built them."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).parents[1]
FILES = sorted((CHECKOUT / "containers").glob("*.Dockerfile"))


def test_there_are_three() -> None:
    assert [path.name for path in FILES] == ["cpu.Dockerfile", "gpu.Dockerfile", "node.Dockerfile"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_an_image_installs_what_its_pages_say(path: Path, tmp_path: Path) -> None:
    lines = path.read_text().splitlines()
    assert lines[0].startswith("# Not built here: ")
    pages = re.findall(r"(?:docs/[\w-]+|README)\.md", lines[0])
    said = "".join((CHECKOUT / page).read_text() for page in pages).replace("chexnet-deploy[", ".[")
    installs = [line.removeprefix("RUN pip install --no-cache-dir ") for line in lines if line.startswith("RUN pip")]
    assert installs
    assert all(f"pip install {each}" in said for each in installs)

    for line in lines:
        if line.startswith("COPY "):
            *sources, place = line.split()[1:]
            for source in sources:
                to = tmp_path / (source if place == "./" else place)
                copy = shutil.copytree if (CHECKOUT / source).is_dir() else shutil.copy
                copy(CHECKOUT / source, to)
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel"]
    subprocess.run(build, cwd=tmp_path, check=True, capture_output=True)
    assert len([*(tmp_path / "dist").glob("*.whl")]) == 1
