"""`make release`: equal to the byte when built twice, whole, and able to run in an empty environment."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from chexnet_deploy import __version__
from chexnet_deploy.files import sha256_of_file
from chexnet_deploy.inputs import tomllib

CHECKOUT = Path(__file__).parents[1]
PROJECT = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["project"]


def test_the_citation_says_what_the_package_says() -> None:
    citation = yaml.safe_load((CHECKOUT / "CITATION.cff").read_text())
    assert citation["cff-version"] == "1.2.0"
    assert citation["authors"] == PROJECT["authors"]
    assert (citation["title"], citation["abstract"]) == (PROJECT["name"], PROJECT["description"])
    assert citation["version"] == PROJECT["version"] == __version__
    assert (citation["license"], citation["keywords"]) == (PROJECT["license"], PROJECT["keywords"])


def test_pages_that_the_front_files_link_exist() -> None:
    for name in ("SECURITY.md", "docs/support.md"):
        text = (CHECKOUT / name).read_text()
        links = re.findall(r"\]\(([^)#]+)\)", text)
        assert links
        assert all(((CHECKOUT / name).parent / link).exists() for link in links)


def test_changes_that_are_in_no_commit_are_not_released(tmp_path: Path) -> None:
    subprocess.run(["git", "init", "--quiet", tmp_path], check=True)
    (tmp_path / "Makefile").write_text((CHECKOUT / "Makefile").read_text())
    done = subprocess.run(["make", "release"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2
    assert "error: found changes that are in no commit, needed none. Commit or remove them." in done.stderr


@pytest.mark.slow
def test_a_release(tmp_path: Path) -> None:
    for name in ("first", "second"):
        subprocess.run(["git", "clone", "--quiet", CHECKOUT, tmp_path / name], check=True)
    command = ["make", "release", "RUNTIME=cpu", f"PYTHON={sys.executable}"]
    done = subprocess.run(command, cwd=tmp_path / "first", capture_output=True, text=True, timeout=1800)
    if re.search("No matching distribution|Could not find a version|NameResolutionError", done.stderr):
        pytest.skip("NOT RUN: no package index answers here")
    assert done.returncode == 0, done.stderr
    assert "yes  run ONNX bundles on the CPU: onnxruntime" in done.stdout
    assert done.stdout.count("PASSED") == 2  # twine, of wheel and sdist

    dist, made = tmp_path / "first" / "dist", tmp_path / "first" / "build" / "release"
    listed = dict(line.split("  ")[::-1] for line in (dist / "SHA256SUMS").read_text().splitlines())
    assert listed == {path.name: sha256_of_file(path) for path in dist.iterdir() if path.name != "SHA256SUMS"}
    packages = [f"chexnet_deploy-{__version__}{end}" for end in ("-py3-none-any.whl", ".tar.gz")]
    texts = ["CHANGELOG.md", "LICENSE", "sbom.cdx.json", "third-party-licenses.md"]
    assert sorted(listed) == sorted([*packages, *texts])

    # Built again elsewhere, by somebody else's habits: umask, time zone, the checkout's times.
    epoch = subprocess.run(["git", "log", "-1", "--format=%ct"], cwd=tmp_path / "first", capture_output=True, text=True)
    again = {**os.environ, "SOURCE_DATE_EPOCH": epoch.stdout.strip(), "TZ": "Asia/Tokyo"}
    build = [made / "tools" / "bin" / "python", "-m", "build", "--no-isolation"]
    subprocess.run(build, cwd=tmp_path / "second", env=again, umask=0o077, check=True, capture_output=True)
    for name in packages:
        assert sha256_of_file(tmp_path / "second" / "dist" / name) == listed[name]

    folders = (made / "runtime").glob("lib/python*/site-packages/*.dist-info")
    installed = {re.sub(r"[-_.]+", "-", folder.name.split("-")[0]).lower() for folder in folders}
    assert {"chexnet-deploy", "numpy", "onnxruntime", "filelock"} <= installed
    assert not {"torch", "onnx", "pip"} & installed
    bill = json.loads((dist / "sbom.cdx.json").read_text())
    assert (bill["bomFormat"], bill["metadata"]["component"]["name"]) == ("CycloneDX", "chexnet-deploy")
    parts = {re.sub(r"[-_.]+", "-", part["name"]).lower() for part in bill["components"]}
    assert parts | {"chexnet-deploy"} == installed
    rows = (dist / "third-party-licenses.md").read_text().lower().replace("_", "-")
    assert all(f"| {name}" in rows for name in installed)
    assert str(tmp_path) not in (dist / "sbom.cdx.json").read_text()
