"""Which plans are kept, without a GPU: a session that answers by rule stands for TensorRT's."""

from pathlib import Path

import numpy as np
import pytest

from benchmarks.rigs.plan_card import CARD, TARGET
from chexnet_deploy.bundle.bundle import Bundle
from chexnet_deploy.bundle.manifest import PLAN_MODEL, PROBE
from chexnet_deploy.bundle.signing.releases import Release
from chexnet_deploy.errors import GateError
from chexnet_deploy.evaluation.spec import read_spec
from chexnet_deploy.export.tensorrt import build
from chexnet_deploy.images.preprocessing import Pixels
from chexnet_deploy.runtime.sessions.base import Logits, Maps
from tests.tiny import write_parent


class ByRule:
    """Answers zero and a shift."""

    batch_range = (1, 4)
    device_memory_bytes = 7
    shift = 0.0
    n_open = 0

    def __init__(self, *_: object, **__: object) -> None:
        type(self).n_open += 1

    def run(self, pixels: Pixels) -> tuple[Logits, Maps]:
        n = len(pixels)
        return np.full((n, 1), self.shift, np.float32), np.zeros((n, 1, 1, 1), np.float32)

    def close(self) -> None:
        type(self).n_open -= 1


@pytest.fixture
def parent(tmp_path: Path) -> Bundle:
    release = Release(line="chexnet-adult", number=3)
    facts = {"operating_points": {"Mass": 0.5}, "ancestors": ("1" * 64,), "tools": {"torch": "1"}, "release": release}
    return write_parent(tmp_path / "parent", **facts)


def keep(parent: Bundle, out: Path, shift: float, monkeypatch: pytest.MonkeyPatch) -> Bundle:
    monkeypatch.setattr(build, "TrtSession", ByRule)
    monkeypatch.setattr(ByRule, "shift", shift)
    verdict, activation_bytes = build._judge(parent, read_spec("fp32"), b"plan", {}, "tensorrt", 0)
    assert (activation_bytes, ByRule.n_open) == (7, 0)
    return build._keep(parent, out, b"plan", verdict, TARGET, CARD)


def test_a_plan_that_answers_as_the_fp32_model_is_kept(
    parent: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = keep(parent, tmp_path / "plan", 1e-5, monkeypatch).manifest
    check = kept.checks[0]
    assert (check.name, check.limit) == (
        "max |probability difference| on the probe",
        read_spec("fp32").gate.max_abs_probability_difference,
    )
    assert kept.probe_max_abs_logit_error == float(np.float32(1e-5))
    assert kept.ancestors == ("1" * 64, parent.id)
    assert (kept.target, kept.engine, set(kept.files)) == (TARGET, CARD, {PLAN_MODEL, PROBE})
    assert (kept.release, kept.tools) == (parent.manifest.release, parent.manifest.tools)


def test_a_plan_that_answers_otherwise_is_not(parent: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = r"^the plan differs from the fp32 model by 0\.2311 in probability on the probe, limit [0-9.e-]+; nothing was kept\.$"
    with pytest.raises(GateError, match=words):
        keep(parent, tmp_path / "plan", 1.0, monkeypatch)
    assert not (tmp_path / "plan").exists()
