"""Draws of patients are whole patients, each draw one of its own."""

import numpy as np

from benchmarks.statistics.self_comparisons import compare_draws, draw_patients
from chexnet_deploy.bundle.manifest import ONNX_MODEL, PROBE
from tests.tiny import tiny_manifest

PATIENTS = np.array([5, 7, 5, 9, 5])


def test_a_draw_takes_all_images_of_a_patient() -> None:
    rng = np.random.default_rng(1)
    for _ in range(20):
        rows, whose = draw_patients(PATIENTS, rng)
        assert len(np.unique(whose)) == 3  # as many draws as patients
        for draw in range(3):
            patient = set(PATIENTS[rows[whose == draw]])
            assert len(patient) == 1
            assert (whose == draw).sum() == (patient.pop() == PATIENTS).sum()


def test_a_model_beside_itself_passes_every_draw() -> None:
    truth = np.arange(400)[:, None] % 2 == 0
    answers = {"a": np.where(truth, 2.0, -2.0).astype(np.float32)}
    manifest = tiny_manifest({ONNX_MODEL: b"", PROBE: b""}, operating_points={"Mass": 0.5})
    found = compare_draws("int8", ["a", "a"], answers, truth, np.arange(400), manifest, 5)
    assert (found.verdicts, found.kept_from_pass) == ({"PASS": 5, "INCONCLUSIVE": 0, "FAIL": 0}, {})
    assert found.on_all == "PASS on 1 of 1"
