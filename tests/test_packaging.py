"""What a user installs: the package, its specs and nothing else."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(command, cwd=CHECKOUT, check=True, capture_output=True, timeout=120)
    return next(folder.glob("*.whl"))


def test_the_wheel_holds_the_package_only(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0].split("-")[0] for name in names} == {"chexnet_deploy"}
    modules = {str(path.relative_to(CHECKOUT)) for path in (CHECKOUT / "chexnet_deploy").rglob("*.py")}
    data = {"py.typed", "engines/int8.toml", "images/content_check.json"}
    assert modules | {f"chexnet_deploy/{name}" for name in data} <= set(names)


def test_the_installed_package_finds_its_specs(wheel: Path, tmp_path: Path) -> None:
    zipfile.ZipFile(wheel).extractall(tmp_path)
    code = "import chexnet_deploy.evaluation.spec as s; print(s.__file__, s.read_spec('int8').precision.value)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.stdout.split() == [str(tmp_path / "chexnet_deploy" / "evaluation" / "spec.py"), "int8"], done.stderr
