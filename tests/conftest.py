"""Shared fixtures: real radiographs where there are any, and the smallest real chain everywhere."""

import fcntl
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

# Each process of several computes on one core: threads that wait for each other's cores take most of the time. Said before
# NumPy and torch are loaded, and to the programs that tests start.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.update(OPENBLAS_NUM_THREADS="1", OMP_NUM_THREADS="1")

import numpy as np
import pytest
from hypothesis import settings

from chexnet_deploy.bundle.bundle import Bundle
from chexnet_deploy.datasets.chestxray14 import ChestXray14
from chexnet_deploy.datasets.data_set import DataSet, open_data
from chexnet_deploy.datasets.findings import FINDINGS
from chexnet_deploy.datasets.radiologist_labels import MAJORITY_READERS
from chexnet_deploy.images.preprocessing import Preprocessing

if TYPE_CHECKING:
    from tests.browser import Browser

CHECKOUT = Path(__file__).parents[1]
SIDE_PX = 32  # the smallest DenseNet-121 takes: one cell of activation map

# How long an example takes on a busy machine is nothing that hypothesis should judge.
settings.register_profile("any machine", deadline=None)
settings.load_profile("any machine")


@pytest.hookimpl(trylast=True)  # when what is not asked for is gone
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Let one file make the bundles for all, and those that need none go next: other processes have work meanwhile.

    Of either kind tests/*.py come first: they try whole chains, and the longest file must not be begun last.
    """
    needing = {item.path for item in items if "bundles" in getattr(item, "fixturenames", ())}
    first = next((item.path for item in items if item.path in needing), None)
    kind_of = {item.path: 0 if item.path == first else 2 if item.path in needing else 1 for item in items}
    items.sort(key=lambda item: (kind_of[item.path], len(item.path.parts)))


@pytest.fixture(scope="session")
def real_root() -> Path:
    """ChestX-ray14 on disk: CHEXNET_CHESTXRAY14, or shared/chestxray14 beside the checkout."""
    root = Path(os.environ.get("CHEXNET_CHESTXRAY14", CHECKOUT.parent / "shared" / "chestxray14"))
    if not root.is_dir():
        pytest.skip("NOT RUN on real radiographs: set CHEXNET_CHESTXRAY14 to a ChestX-ray14 folder")
    return root


@pytest.fixture(scope="session")
def real_small() -> tuple[Path, Path]:
    """15,152 radiographs of 64 to 128 px and a CheXNet trained on them, in shared/ beside the checkout."""
    shared = CHECKOUT.parent / "shared"
    root, checkpoint = shared / "chestxray14_128", shared / "checkpoints" / "chexnet-96px.safetensors"
    if not (root.is_dir() and checkpoint.is_file()):
        pytest.skip("NOT RUN on a trained CheXNet: shared/chestxray14_128 and shared/checkpoints are not here")
    return root, checkpoint


@pytest.fixture
def without_gpu() -> None:
    """Not for machines that have one."""
    from chexnet_deploy.errors import ChexnetError
    from chexnet_deploy.runtime.sessions.driver import open_driver

    try:
        open_driver()
    except ChexnetError:
        return
    pytest.skip("NOT RUN without a GPU: there is one here")


@pytest.fixture(scope="session")
def gpu_backends() -> list[str]:
    """Every TensorRT installed on this GPU machine; without one the test is reported as not run, or fails if required."""
    from chexnet_deploy.errors import ChexnetError
    from chexnet_deploy.runtime.sessions.driver import open_driver
    from chexnet_deploy.runtime.sessions.trt_versions import open_tensorrt

    missing, backends = [], []
    try:
        open_driver()
        for backend in ("tensorrt", "tensorrt_rtx"):
            try:
                open_tensorrt(backend)  # type: ignore[arg-type]
                backends.append(backend)
            except ChexnetError as err:
                missing.append(str(err))
    except ChexnetError as err:
        missing.append(str(err))
    if not backends:
        reason = f"NOT RUN on a GPU: {'; '.join(missing)}"
        if os.environ.get("CHEXNET_REQUIRE_GPU") == "1":
            pytest.fail(reason)
        pytest.skip(reason)
    return backends


@pytest.fixture(scope="session")
def phantom_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """About 230 phantom images of 150 patients, 40 of them test patients, at 32 px."""
    from training.phantoms.draw import PhantomSpec, write_phantom

    root = tmp_path_factory.mktemp("data") / "phantom"
    write_phantom(root, PhantomSpec(patients=150, test_patients=40, side_px=SIDE_PX, seed=5, prevalence=0.2), workers=1)
    return root


@pytest.fixture(scope="session")
def phantom(phantom_root: Path) -> ChestXray14:
    return ChestXray14.open(phantom_root)


@pytest.fixture(scope="session")
def phantom_data(phantom_root: Path) -> DataSet:
    """The phantoms as every command takes them."""
    return open_data(phantom_root)


@pytest.fixture(scope="session")
def checkpoint_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained CheXNet for 32 px whose BatchNorm has seen images, so that its activations are of ordinary size."""
    import torch

    from chexnet_deploy.bundle.probe import draw_probe_pixels
    from chexnet_deploy.export.from_torch.checkpoint import CheckpointManifest, write_checkpoint
    from chexnet_deploy.export.from_torch.model import CheXNet, Normalise

    torch.manual_seed(0)
    preprocessing = Preprocessing(resize_px=SIDE_PX)
    model = CheXNet(len(FINDINGS)).train()
    images = Normalise(preprocessing)(torch.from_numpy(draw_probe_pixels(SIDE_PX)))
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 0.95  # what the usual 0.1 comes to in 30 passes
    with torch.no_grad():
        model(images)
        # An untrained network amplifies rounding far more than a trained one; a smaller head keeps it ordinary.
        model.classifier.weight.mul_(0.3)
        model.classifier.bias.copy_(torch.linspace(-2.0, 1.0, len(FINDINGS)))
    manifest = CheckpointManifest(
        findings=FINDINGS,
        preprocessing=preprocessing,
        operating_points=dict.fromkeys(FINDINGS, 0.3),
        recipe={},
        split_sha256="0" * 64,
        metrics={},
        tools={},
    )
    path = tmp_path_factory.mktemp("checkpoint") / "best.safetensors"
    write_checkpoint(path, model, manifest)
    return path


@pytest.fixture(scope="session")
def bundles(checkpoint_path: Path, phantom_root: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Bundle]:
    """Fp32, fp16, int8 and int8-cpu of the checkpoint, made as `chexnet-deploy export` makes them. Copy before you change one."""
    from chexnet_deploy.bundle.manifest import Precision
    from chexnet_deploy.export.chain import export_bundles

    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent  # the first process makes them for all
    with (folder / "bundles.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "bundles.done").exists():
            export_bundles(
                checkpoint_path,
                folder / "bundles",
                tuple(Precision),
                data_root=phantom_root,
                calibration_list=None,
                n_calibration_images=100,
                dialects=("typed", "cpu"),
                on_phase=lambda phase, done, total: None,
            )
            (folder / "bundles.done").touch()
    names = ("fp32", "fp16", "int8", "int8-cpu")
    return {name: Bundle.open(folder / "bundles" / name) for name in names}


@pytest.fixture(scope="session")
def phantom_predictions(phantom: ChestXray14, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Probabilities of all 14 findings for every phantom image, better than chance."""
    rng = np.random.default_rng(1)
    rows = [",".join(("Image Index", *(f"prob_{finding}" for finding in FINDINGS)))]
    for radiograph in phantom.radiographs:
        present = np.array([finding in radiograph.findings for finding in FINDINGS])
        rows.append(",".join((radiograph.image, *(f"{p:.6f}" for p in rng.uniform(0.0, 0.6, 14) + 0.3 * present))))
    path = tmp_path_factory.mktemp("predictions") / "predictions.csv"
    path.write_text("\n".join(rows) + "\n")
    return path


@pytest.fixture(scope="session")
def phantom_readers(phantom: ChestXray14, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five readers' labels of the phantom test images, right nine times in ten, in the files of the public ones."""
    rng = np.random.default_rng(2)
    root = tmp_path_factory.mktemp("readers") / "expert_labels"
    root.mkdir()
    readers = ("1", "2", *MAJORITY_READERS)
    header = ",".join(finding.replace("_", " ") for finding in FINDINGS)
    individual, majority = [f"Image ID,Patient ID,Reader ID,{header}"], [f"Image ID,Patient ID,{header}"]
    for radiograph in phantom.split("test"):
        present = np.array([finding in radiograph.findings for finding in FINDINGS])
        reads = present ^ (rng.random((len(readers), 14)) < 0.1)
        for reader, read in zip(readers, reads, strict=True):
            cells = ",".join("YES" if cell else "NO" for cell in read)
            individual.append(f"{radiograph.image},{radiograph.patient},{reader},{cells}")
        cells = ",".join("YES" if votes >= 2 else "NO" for votes in reads[2:].sum(axis=0))
        majority.append(f"{radiograph.image},{radiograph.patient},{cells}")
    (root / "test_individual_readers.csv").write_text("\n".join(individual) + "\n")
    (root / "test_labels.csv").write_text("\n".join(majority) + "\n")
    return root


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(14)


@pytest.fixture
def browser(tmp_path: Path) -> Iterator["Browser"]:
    from tests.browser import AXE, Browser  # needs websocket-client

    program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if program is None or not AXE.is_file():
        reason = (
            f"NOT RUN in a browser: {'install chromium' if program is None else 'run make test, which installs axe'}"
        )
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    opened = Browser(program, tmp_path / "profile")
    yield opened
    opened.close()
