"""Services that the tests share."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from chexnet_deploy.bundle.bundle import Bundle
from tests.serving.running import Running, Start


@pytest.fixture(scope="session")
def start(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Start]:
    """Start services that are ended with the tests."""
    started: list[Running] = []
    folder = tmp_path_factory.mktemp("services")

    def run(bundle: Path, *options: str, wait: bool = True) -> Running:
        started.append(Running([str(bundle), *options], folder / f"{len(started)}.log"))
        if wait:
            started[-1].wait_for_log("ready: ")
        return started[-1]

    yield run
    for service in started:
        service.process.kill()
        service.process.wait()


@pytest.fixture(scope="session")
def served(bundles: dict[str, Bundle]) -> Bundle:
    return bundles["int8-cpu"]


@pytest.fixture(scope="session")
def service(start: Start, served: Bundle) -> Running:
    """One that most tests share."""
    return start(served.path, "--max-body-mib", "1", "--receive-s", "2", "--answer-s", "5", "--max-connections", "64")


@pytest.fixture(scope="session")
def radiograph(phantom_root: Path) -> bytes:
    return sorted((phantom_root / "images").glob("*.png"))[0].read_bytes()
