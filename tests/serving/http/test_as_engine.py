"""Our own service is an engine like another: measured, it is the bundle behind it."""

from pathlib import Path

import numpy as np

from chexnet_deploy.bundle.bundle import Bundle
from chexnet_deploy.runtime.contract import read_contract
from chexnet_deploy.runtime.engine import find_engine, open_engine
from chexnet_deploy.runtime.sessions.base import run_in_batches
from tests.foreign import write_contract
from tests.serving.running import Running


def test_the_service_gives_the_numbers_of_its_bundle(service: Running, served: Bundle, tmp_path: Path) -> None:
    contract = write_contract(tmp_path / "c.toml", served.findings, range="[0, 255]")
    contract.write_text(contract.read_text().replace("[output]", '[output]\nname = "logits"'))
    url = f"http://127.0.0.1:{service.port}/v2/models/chexnet"
    session = open_engine(find_engine(url, read_contract(contract)))
    probe = served.read_probe()
    wanted, _ = run_in_batches(open_engine(served), probe.pixels[:8])
    # In batches of several the service may answer in others than these: int8 sums are the same to rounding.
    np.testing.assert_allclose(session.run(probe.pixels[:8])[0], wanted, atol=1e-4)
