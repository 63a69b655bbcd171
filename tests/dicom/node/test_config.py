from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chexnet_deploy.dicom.node.config import NodeConfig, read_config
from chexnet_deploy.errors import NodeError

WHOLE = """
folder = "/var/lib/chexnet-node"

[listen]
ae_title = "CHEXNET"
calling_ae_titles = ["SCANNER"]
networks = ["10.20.0.0/16", "127.0.0.1/32"]

[[destinations]]
host = "10.20.0.9"
port = 104
ae_title = "PACS"

[device]
serial_number = "1"

[model]
bundle = "/opt/chexnet/bundle"
"""


def write(tmp_path: Path, content: str) -> Path:
    path = tmp_path / "node.toml"
    path.write_text(content)
    path.chmod(0o600)
    return path


def read(tmp_path: Path, content: str = WHOLE) -> NodeConfig:
    return read_config(write(tmp_path, content))


def test_the_smallest_configuration_has_every_limit(tmp_path: Path) -> None:
    config = read(tmp_path)
    assert config.listen.port == 11112
    assert config.limits.max_object_bytes == 192 * 1024 * 1024
    # Three hangs, a restart after each, a slow self-test and the time between two: 15 + 4 x 20 + 3 x 60.
    assert config.watchdog_s == 275.0


def test_networks_decide_who_may_connect(tmp_path: Path) -> None:
    listen = read(tmp_path).listen
    assert [listen.may_connect(peer) for peer in ("10.20.3.4", "127.0.0.1", "10.21.0.1", "::1")] == [
        True,
        True,
        False,
        False,
    ]


@pytest.mark.parametrize(
    ("old", "new", "named"),
    [
        ("[model]", "[modell]", "modell"),
        ("port = 104", 'port = "104"', "port"),
        ("port = 104", "port = 104\ntimeout = 3", "timeout"),
        ("port = 104", "port = 70000", "port"),
        ('ae_title = "PACS"', 'ae_title = "SEVENTEEN LETTERS"', "ae_title"),
        ('ae_title = "PACS"', 'ae_title = " PACS"', "ae_title"),
        ('["SCANNER"]', "[]", "calling_ae_titles"),
        ('"10.20.0.0/16"', '"10.20.0.1/16"', "host bits"),
        ('"10.20.0.0/16"', '"hospital"', "hospital"),
        ('"/var/lib/chexnet-node"', '"state"', "absolute"),
        ("[model]", "[limits]\nmax_associations = 100\n[model]", "arriving at once"),
        ("[model]", "[limits]\nidle_s = -1\n[model]", "idle_s"),
        ("[model]", "[limits]\nidle_s = nan\n[model]", "idle_s"),
        ("[model]", "[outbox]\nfirst_retry_s = 500\n[model]", "max_retry_s"),
        ("[model]", '[[destinations]]\nhost = "x"\nport = 1\nae_title = "PACS"\n[model]', "same ae_title"),
        ("[model]", "[results]\nexplain_refusals = 1\n[model]", "explain_refusals"),
        ("[model]", "[outbox]\nkeep_mib = -1\n[model]", "keep_mib"),
        ('ae_title = "PACS"', 'ae_title = "PACS"\ntls = true', "both or neither"),
        ('ae_title = "CHEXNET"', 'ae_title = "CHEXNET"\ntls = true', "both or neither"),
        ("[model]", '[tls]\ncertificate = "/c"\nkey = "/k"\nauthorities = "/a"\n[model]', "both or neither"),
        ("[model]", '[tls]\ncertificate = "/c"\nauthorities = "/a"\n[model]', "tls.key"),
        ("[model]", "[model", "not TOML"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, old: str, new: str, named: str) -> None:
    with pytest.raises(NodeError, match=named):
        read(tmp_path, WHOLE.replace(old, new, 1))


@pytest.mark.parametrize("content", [b"\xef\xbb\xbf", b"\xef\xbb\xbf# \xc3\xbc\r\n", b"# \xc3\xbc\n"])
def test_a_byte_order_mark_is_passed_over(tmp_path: Path, content: bytes) -> None:
    path = write(tmp_path, "")
    path.write_bytes(content + WHOLE.encode())
    assert read_config(path) == read(tmp_path)


@pytest.mark.parametrize("mode", [0o666, 0o620, 0o602])
def test_configuration_that_others_may_write_is_refused(tmp_path: Path, mode: int) -> None:
    path = write(tmp_path, WHOLE)
    path.chmod(mode)
    with pytest.raises(NodeError, match="chmod go-w"):
        read_config(path)


def test_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(NodeError, match="No such file"):
        read_config(tmp_path / "absent.toml")


@given(st.text(max_size=20))
def test_unknown_keys_are_refused(key: str) -> None:
    known = {"host", "port", "ae_title", "calling_ae_titles", "networks"}
    fields = {"ae_title": "A", "calling_ae_titles": ["B"], "networks": ["::/0"], **({} if key in known else {key: 1})}
    config = {
        "folder": "/a",
        "listen": fields,
        "destinations": [{"host": "h", "port": 1, "ae_title": "P"}],
        "model": {"bundle": "/b"},
        "device": {"serial_number": "1"},
    }
    if key in known:
        NodeConfig.model_validate(config)
    else:
        with pytest.raises(ValueError, match="Extra inputs"):
            NodeConfig.model_validate(config)
