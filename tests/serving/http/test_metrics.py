"""Statistics of images are published a hundred at a time: a scrape between two blocks can't tell one patient's."""

import numpy as np

from chexnet_deploy.bundle.bundle import Bundle
from chexnet_deploy.bundle.site import OperatingPoints
from chexnet_deploy.serving.http.metrics import BLOCK, Metrics


def value(metrics: Metrics, line: str) -> float:
    found = [row for row in metrics.to_text().decode().splitlines() if row.startswith(line + " ")]
    return float(found[0].split(" ")[1]) if found else 0.0


def test_scores_appear_in_whole_blocks(served: Bundle) -> None:
    metrics = Metrics()
    metrics.set_engine(served, OperatingPoints.of(served.manifest, None), "openvino")
    findings = served.manifest.findings
    pixels = np.full((1, 1, 32, 32), 255, np.uint8)
    logits = np.full((1, len(findings)), 5.0, np.float32)  # probability 0.9933, over every operating point
    for _ in range(BLOCK - 1):
        metrics.count_images(pixels, logits, findings)
    assert value(metrics, "chexnet_pixel_mean_count") == 0.0
    metrics.count_images(pixels, logits, ("other",))
    assert value(metrics, "chexnet_pixel_mean_count") == 0.0
    metrics.count_images(pixels, logits, findings)
    assert value(metrics, "chexnet_pixel_mean_sum") == 255.0 * BLOCK
    assert value(metrics, "chexnet_pixel_clipped_share_sum") == float(BLOCK)
    assert value(metrics, f'chexnet_present_total{{finding="{findings[0]}"}}') == float(BLOCK)
    assert value(metrics, f'chexnet_score_bucket{{finding="{findings[0]}",le="0.95"}}') == 0.0


def test_drift_is_told_in_the_calibration_images_own_spread(bundles: dict[str, Bundle]) -> None:
    calibration = bundles["int8"].manifest.calibration
    assert calibration is not None
    metrics, findings = Metrics(), bundles["int8"].manifest.findings
    metrics.set_engine(bundles["int8"], OperatingPoints.of(bundles["int8"].manifest, None), "openvino")
    moved = np.add(calibration.logit_mean, np.multiply(2.0, calibration.logit_sd)).astype(np.float32)[None]
    for _ in range(BLOCK - 1):
        metrics.count_images(np.zeros((1, 1, 32, 32), np.uint8), moved, findings)
    assert "chexnet_logit_drift{" not in metrics.to_text().decode()
    metrics.count_images(np.zeros((1, 1, 32, 32), np.uint8), moved, findings)
    for finding in findings:
        assert abs(value(metrics, f'chexnet_logit_drift{{finding="{finding}"}}') - 2.0) < 1e-3
    metrics.set_engine(
        bundles["fp32"], OperatingPoints.of(bundles["fp32"].manifest, None), "openvino"
    )  # has no calibration
    assert "chexnet_logit_drift{" not in metrics.to_text().decode()
