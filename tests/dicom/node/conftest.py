"""A node that really answers, and DCMTK's programs as its peers."""

import gc
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

# pydicom and pynetdicom belong to the extra `node`.
pytest.importorskip("pynetdicom")

from benchmarks.rigs.node_rig import NodeProcess, Pacs, find_dcmtk
from chexnet_deploy.bundle.bundle import Bundle


def dcmtk(program: str) -> str:
    """Return a DCMTK program's path; without it the test is reported as not run, and fails in CI."""
    path = find_dcmtk(program)
    if path is None:
        reason = f"NOT RUN against DCMTK's {program}: apt-get install dcmtk"
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    return path


@pytest.fixture(scope="session")
def storescu() -> str:
    return dcmtk("storescu")


@pytest.fixture(scope="session")
def echoscu() -> str:
    return dcmtk("echoscu")


@pytest.fixture(scope="session")
def storescp() -> str:
    return dcmtk("storescp")


@pytest.fixture
def node(bundles: dict[str, Bundle], tmp_path: Path) -> Iterator[NodeProcess]:
    """A node of its own, not started."""
    process = NodeProcess(tmp_path / "node", bundles["fp32"].path)
    yield process
    if process.process is not None:
        process.kill()


@pytest.fixture
def pacs(node: NodeProcess, storescp: str, tmp_path: Path) -> Iterator[Pacs]:
    """The node's destination, not started."""
    destination = Pacs(tmp_path / "pacs", node.pacs_port, storescp)
    yield destination
    if destination.process is not None:
        destination.stop()


@pytest.fixture(autouse=True)
def _collected() -> Iterator[None]:
    """Let what pynetdicom leaves of connections that broke off be collected here, not in another test."""
    yield
    gc.collect()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Bear with pynetdicom, which shuts a socket down before it closes it, and so never closes one that was cut."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.filterwarnings("ignore:unclosed <socket:ResourceWarning"))
