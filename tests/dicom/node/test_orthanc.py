"""A whole node with Orthanc as the archive on both sides: what comes of a study is found in it."""

import os
from pathlib import Path

import pytest

from benchmarks.rigs.orthanc import find_orthanc
from benchmarks.services.orthanc_studies import KINDS, draw_study, send_studies
from chexnet_deploy.bundle.bundle import Bundle


@pytest.fixture(scope="session")
def orthanc() -> str:
    path = find_orthanc()
    if path is None:
        reason = "NOT RUN against Orthanc: apt-get install orthanc"
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    return path


@pytest.mark.slow
def test_every_image_is_answered_or_refused_in_its_study(
    bundles: dict[str, Bundle], orthanc: str, tmp_path: Path
) -> None:
    studies = [draw_study(kind, seed) for seed, kind in enumerate(KINDS)]
    outcome = send_studies(
        tmp_path, bundles["fp32"].path, orthanc, studies, kills=1, seed=1, on_sent=lambda done, of: None
    )
    assert outcome.amiss == ()
    # By kind: 1 + 1 + 1 + 2 + 0 + 1 + 1 + 1 + 2 + 1 reports; a lateral view in two, and three knees.
    assert outcome.answered == 11
    assert outcome.refused == {"view": 2, "body-part": 2}
    assert outcome.kills == 1
