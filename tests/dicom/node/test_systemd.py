import shutil
import subprocess
from pathlib import Path

import pytest

from chexnet_deploy.dicom.node.config import NodeConfig
from chexnet_deploy.dicom.node.systemd import unit
from chexnet_deploy.errors import NodeError

COMMAND = ("/usr/bin/true",)  # verify wants a program that is there


def config(**changes: object) -> NodeConfig:
    return NodeConfig.model_validate(
        {
            "folder": "/var/lib/chexnet-node",
            "listen": {"ae_title": "CHEXNET", "calling_ae_titles": ["SCANNER"], "networks": ["10.20.0.0/16"]},
            "destinations": [{"host": "10.20.0.9", "port": 104, "ae_title": "PACS"}],
            "model": {"bundle": "/opt/chexnet/bundle"},
            "device": {"serial_number": "1"},
            **changes,
        }
    )


def make(needs_gpu: bool = False, **changes: object) -> str:
    return unit(config(**changes), Path("/etc/chexnet/node.toml"), COMMAND, needs_gpu=needs_gpu)


def test_deadlines_and_addresses_are_the_configurations() -> None:
    lines = make().splitlines()
    assert "Type=notify" in lines
    assert "WatchdogSec=275" in lines
    assert "TimeoutStopSec=35" in lines
    assert "MemoryMax=4096M" in lines
    assert "StateDirectory=chexnet-node" in lines
    assert "IPAddressDeny=any" in lines
    assert "IPAddressAllow=10.20.0.0/16 10.20.0.9" in lines
    assert "ExecStart=/usr/bin/true node /etc/chexnet/node.toml" in lines


def test_a_gpu_is_let_in_only_where_one_is_needed() -> None:
    assert "PrivateDevices=yes" in make()
    assert "nvidia" not in make()
    assert "DeviceAllow=char-nvidia rw" in make(needs_gpu=True)
    assert "PrivateDevices" not in make(needs_gpu=True)


@pytest.mark.parametrize(("provider", "denied"), [("cpu", True), ("openvino", False)])
def test_memory_that_is_written_is_never_run_where_no_kernel_is_compiled(provider: str, denied: bool) -> None:
    text = make(model={"bundle": "/opt/chexnet/bundle", "provider": provider})
    assert ("MemoryDenyWriteExecute=yes" in text) is denied


def test_named_destination_leaves_addresses_open_and_says_so() -> None:
    text = make(destinations=[{"host": "pacs.hospital", "port": 104, "ae_title": "PACS"}])
    assert "IPAddressDeny" not in text
    assert "addresses are not restricted" in text


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"folder": "/srv/node"}, "/var/lib"),
        ({"model": {"bundle": "/home/me/bundle"}}, "home"),
        ({"model": {"bundle": "/opt/chexnet/bundle", "trust": "/home/me/trust.toml"}}, "home"),
        (
            {
                "tls": {"certificate": "/etc/node.pem", "key": "/root/node.key", "authorities": "/etc/peers.pem"},
                "destinations": [{"host": "10.20.0.9", "port": 104, "ae_title": "PACS", "tls": True}],
            },
            "home",
        ),
    ],
)
def test_what_a_service_cannot_see_is_refused(changes: dict[str, object], named: str) -> None:
    with pytest.raises(NodeError, match=named):
        make(**changes)


@pytest.mark.parametrize("path", ["/etc/my node.toml", "/etc/%n.toml", "/etc/$HOME.toml"])
def test_paths_that_systemd_would_read_otherwise_are_refused(path: str) -> None:
    with pytest.raises(NodeError, match="another path"):
        unit(config(), Path(path), COMMAND, needs_gpu=False)


@pytest.mark.parametrize("needs_gpu", [False, True])
def test_systemd_finds_nothing_wrong_and_little_exposed(tmp_path: Path, needs_gpu: bool) -> None:
    analyze = shutil.which("systemd-analyze")
    if analyze is None:
        pytest.skip("NOT RUN: systemd-analyze is not installed (Debian: systemd)")
    path = tmp_path / "chexnet-node.service"
    path.write_text(make(needs_gpu=needs_gpu))
    verified = subprocess.run([analyze, "verify", "--man=no", path], capture_output=True, text=True)
    ours = [line for line in verified.stderr.splitlines() if path.name in line]
    assert (verified.returncode, ours) == (0, [])
    rated = subprocess.run(
        [analyze, "security", "--no-pager", "--offline=true", "--threshold=20", path], capture_output=True, text=True
    )
    assert rated.returncode == 0, rated.stdout[-600:]  # exposure 2.0 of 10 at the most
