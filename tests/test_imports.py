"""The runtime on a bare box: what importing costs, and what it must never need."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from chexnet_deploy.bundle.bundle import Bundle
from chexnet_deploy.errors import TrustError

HEAVY = (
    "torch",
    "onnx",
    "safetensors",
    "scipy",
    "sklearn",
    "pandas",
    "matplotlib",
    "jinja2",
    "typer",
    "rich",
    "pyarrow",
    "pydicom",
    "cryptography",
    "pynetdicom",
    "gdcm",
    "highdicom",
    "starlette",
    "uvicorn",
    "prometheus_client",
    "python_multipart",
)


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)


def test_importing_the_package_loads_nothing_heavy() -> None:
    done = run_python(f"import chexnet_deploy, sys; print([m for m in {HEAVY} + ('onnxruntime',) if m in sys.modules])")
    assert done.stdout.strip() == "[]", done.stderr


def test_the_runtime_runs_where_nothing_heavy_can_be_imported(bundles: dict[str, Bundle], tmp_path: Path) -> None:
    code = f"""
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] in {HEAVY}:
            raise ModuleNotFoundError(name, name=name)
sys.meta_path.insert(0, Refuse())
import numpy as np
import chexnet_deploy
from chexnet_deploy import Predictor
with Predictor.open({str(bundles["int8"].path)!r}) as predictor:
    prediction = predictor.predict(np.arange(64 * 64, dtype=np.uint32).reshape(64, 64).astype(np.uint8))
print(len(prediction.probabilities), [m for m in {HEAVY} if m in sys.modules])
"""
    done = run_python(code)
    assert done.stdout.strip() == "14 []", done.stderr


@pytest.mark.slow
def test_onnx_runtime_does_not_call_home(bundles: dict[str, Bundle], tmp_path: Path) -> None:
    # Its telemetry leaves a file in the temporary folder as soon as it starts. CI switches it off by itself.
    environment = {name: value for name, value in os.environ.items() if name not in ("CI", "ORT_DISABLE_TELEMETRY")}
    code = f"from chexnet_deploy import Predictor; Predictor.open({str(bundles['int8'].path)!r}).close()"
    for module in (code, "import chexnet_deploy.export.quantize.quantize, chexnet_deploy.export.from_torch.to_onnx"):
        subprocess.run(
            [sys.executable, "-c", module], check=True, timeout=120, env={**environment, "TMPDIR": str(tmp_path)}
        )
    assert not list(tmp_path.iterdir())


def test_all_public_names_exist() -> None:
    import chexnet_deploy

    assert all(hasattr(chexnet_deploy, name) for name in chexnet_deploy.__all__)


def test_paths_may_be_text(bundles: dict[str, Bundle], phantom_root: Path, tmp_path: Path) -> None:
    from chexnet_deploy import Trust, read_image
    from chexnet_deploy.datasets import open_data
    from chexnet_deploy.images import find_images

    bundle, image = bundles["fp32"], sorted((phantom_root / "images").iterdir())[0]
    assert Bundle.open(str(bundle.path)).path == bundle.path
    written = Bundle.write(str(tmp_path / "b"), bundle.manifest, bundle.read_model(), bundle.read_probe_bytes())
    assert written.id == bundle.id
    assert read_image(str(image)).tobytes() == read_image(image).tobytes()
    assert find_images([str(phantom_root / "images")]) == find_images([phantom_root / "images"])
    assert open_data(str(phantom_root)).table == open_data(phantom_root).table
    with pytest.raises(TrustError, match=r"trust\.toml is missing"):
        Trust.read(str(tmp_path / "trust.toml"))


@pytest.mark.parametrize(
    ("arguments", "limit_s"), [(["-c", "import chexnet_deploy"], 0.25), (["-m", "chexnet_deploy", "--help"], 0.6)]
)
def test_start_up_is_quick(arguments: list[str], limit_s: float) -> None:
    # User + system time, not wall time: other work on the machine must not fail this. The best of seven, as the figure
    # is what the code costs.
    def cpu_seconds() -> float:
        before = os.times()
        subprocess.run([sys.executable, *arguments], check=True, capture_output=True)
        after = os.times()
        return after.children_user + after.children_system - before.children_user - before.children_system

    assert min(cpu_seconds() for _ in range(7)) <= limit_s
