"""What the service tells Prometheus; nothing of a single patient.

Scores and pixels are published in blocks of 100 images: a scrape between two of them can't tell one patient's. An int8 manifest
holds the mean and spread of the logits on its calibration images, and drift is how far a block's mean lies from them. What
saturates inside the network, saturation.py finds out.
"""

from collections.abc import Mapping, Sequence
from typing import Final

import numpy as np
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from chexnet_deploy.bundle.bundle import Bundle
from chexnet_deploy.bundle.manifest import Calibration
from chexnet_deploy.bundle.site import OperatingPoints
from chexnet_deploy.images.preprocessing import Pixels
from chexnet_deploy.runtime.sessions.base import Logits, sigmoid
from chexnet_deploy.serving.http.saturation import BLOCK as SATURATION_BLOCK

CONTENT_TYPE: Final = CONTENT_TYPE_LATEST
BLOCK: Final = 100
_STAGE_BUCKETS_S: Final = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
_SCORE_BUCKETS: Final = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 1.0)
_GRAY_BUCKETS: Final = (16, 32, 64, 96, 112, 128, 144, 160, 192, 224, 240, 255)
_SHARE_BUCKETS: Final = (0.001, 0.01, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0)


class Metrics:
    """One service's, in a registry of its own."""

    def __init__(self) -> None:
        registry = self._registry = CollectorRegistry()
        self.stage = Histogram(
            "chexnet_stage_seconds",
            "Time a request spends in each stage",
            ["stage"],
            buckets=_STAGE_BUCKETS_S,
            registry=registry,
        )
        self.requests = Counter("chexnet_requests", "Answers", ["route", "status"], registry=registry)
        self.refusals = Counter("chexnet_refusals", "Requests refused", ["reason"], registry=registry)
        self.queue = Gauge("chexnet_queue_images", "Images that wait for inference", registry=registry)
        self.admitted = Gauge("chexnet_admitted_images", "Images admitted and not answered yet", registry=registry)
        self.batches = Histogram(
            "chexnet_batch_images", "Images in one run", buckets=(1, 2, 4, 8, 16, 32, 64, 128, 256), registry=registry
        )
        self.connections = Gauge("chexnet_connections", "Open connections", registry=registry)
        self.held = Gauge("chexnet_held_bytes", "Request bodies and unread answers in memory", registry=registry)
        self.ended = Counter(
            "chexnet_connections_ended", "Connections ended by the guard", ["reason"], registry=registry
        )
        self.swaps = Counter("chexnet_swaps", "Attempts to take another bundle", ["result"], registry=registry)
        self.ready = Gauge("chexnet_ready", "1 where images are answered", registry=registry)
        self._engine = Gauge(
            "chexnet_engine",
            "1 for the bundle that runs, and the site file whose operating points decide, if any",
            ["bundle", "precision", "backend", "site"],
            registry=registry,
        )
        self._known_answers = Counter(
            "chexnet_known_answers", "Times the engine was asked for its known answers", ["result"], registry=registry
        )
        self._scores = Histogram(
            "chexnet_score",
            f"Probabilities by finding, in blocks of {BLOCK} images",
            ["finding"],
            buckets=_SCORE_BUCKETS,
            registry=registry,
        )
        self._present = Counter(
            "chexnet_present",
            f"Images at or above an operating point, in blocks of {BLOCK}",
            ["finding"],
            registry=registry,
        )
        self._gray = Histogram(
            "chexnet_pixel_mean",
            f"Mean gray of the pixels, in blocks of {BLOCK}",
            buckets=_GRAY_BUCKETS,
            registry=registry,
        )
        self._clipped = Histogram(
            "chexnet_pixel_clipped_share",
            f"Share of pixels at 0 or 255, in blocks of {BLOCK}",
            buckets=_SHARE_BUCKETS,
            registry=registry,
        )
        self._drift = Gauge(
            "chexnet_logit_drift",
            f"Mean logit of the last {BLOCK} images less the calibration images', in standard deviations of theirs",
            ["finding"],
            registry=registry,
        )
        self._saturation = Gauge(
            "chexnet_int8_saturated_share",
            f"Mean share of a tensor's int8 values at an end of their range, over {SATURATION_BLOCK} sampled images",
            ["tensor"],
            registry=registry,
        )
        self._block: list[tuple[float, float, Logits]] = []
        self._findings: tuple[str, ...] = ()
        self._points: dict[str, float] = {}
        self._calibration: Calibration | None = None
        for stage in ("read", "preprocess", "queue", "infer"):
            self.stage.labels(stage)
        for result in ("right", "wrong"):
            self._known_answers.labels(result)

    def count_known_answers(self, is_right: bool) -> None:  # noqa: FBT001 - a callback's one argument
        """Count one time that the known answers were asked for."""
        self._known_answers.labels("right" if is_right else "wrong").inc()

    def set_engine(self, bundle: Bundle, points: OperatingPoints, backend: str) -> None:
        """Name the bundle that runs and what decides from now on; an unfinished block of the one before is dropped."""
        manifest = bundle.manifest
        self._engine.clear()
        self._engine.labels(bundle.id, manifest.precision.value, backend, points.site or "").set(1)
        self._findings, self._points = manifest.findings, dict(points.present_at)
        self._calibration = manifest.calibration
        self._block.clear()
        self._drift.clear()
        self._saturation.clear()

    def count_images(self, pixels: Pixels, logits: Logits, findings: Sequence[str]) -> None:
        """Add images that were answered to the block.

        Args:
            pixels: uint8 [N, 1, S, S].
            logits: float32 [N, C].
            findings: of the engine that answered; another's than the one that runs are left out.
        """
        if tuple(findings) != self._findings:
            return
        for image, row in zip(pixels, logits, strict=True):
            clipped = float(np.count_nonzero((image == 0) | (image == 255))) / image.size
            self._block.append((float(image.mean()), clipped, row))
        if len(self._block) >= BLOCK:
            self._publish()

    def set_saturation(self, shares: Mapping[str, float]) -> None:
        """Publish tensor -> share of its values at an end of its range."""
        for tensor, share in shares.items():
            self._saturation.labels(tensor).set(share)

    def _publish(self) -> None:
        means, clipped, logits = zip(*self._block, strict=True)
        for mean, share in zip(means, clipped, strict=True):
            self._gray.observe(mean)
            self._clipped.observe(share)
        # By finding, so that each is looked up once: requests wait for this.
        for finding, scores in zip(self._findings, sigmoid(np.array(logits)).T.tolist(), strict=True):
            histogram, point = self._scores.labels(finding), self._points.get(finding, 2.0)
            for score in scores:
                histogram.observe(score)
            if n_present := sum(score >= point for score in scores):
                self._present.labels(finding).inc(n_present)
        if self._calibration is not None:
            now = np.mean(logits, axis=0, dtype=np.float64)
            then, spread = np.array(self._calibration.logit_mean), np.array(self._calibration.logit_sd)
            drift = np.divide(now - then, spread, out=np.zeros_like(now), where=spread > 0.0)
            for finding, value in zip(self._findings, drift.tolist(), strict=True):
                self._drift.labels(finding).set(value)
        self._block.clear()

    def to_text(self) -> bytes:
        """Return the exposition format."""
        return generate_latest(self._registry)
