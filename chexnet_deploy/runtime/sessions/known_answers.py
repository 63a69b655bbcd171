"""The known answers of a bundle, as a session is held to them: at its opening, and before every further way it runs images.

A backend may run a batch by other kernels than a single image, so a way of running is checked before its first answer.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

from chexnet_deploy.bundle.bundle import Bundle
from chexnet_deploy.bundle.probe import Probe
from chexnet_deploy.errors import SessionError
from chexnet_deploy.images.preprocessing import Pixels
from chexnet_deploy.runtime.sessions.base import Logits, Maps

Run: TypeAlias = Callable[[Pixels], tuple[Logits, Maps]]

N_STARTUP_PROBES: Final = 4
"""Enough to catch a wrong file or backend, few enough for a scanner's start-up."""
# What two machines may differ by beyond the error measured when the bundle was kept: other instruction sets round
# other ways. Fp32 logits of the same graph differ by about 1e-5 between AVX2 and AVX-512.
LOGIT_SLACK: Final = 2e-3
CAM_IDENTITY_TOLERANCE: Final = 1e-4


@dataclass(frozen=True, slots=True, eq=False)
class KnownAnswers:
    """The first of a bundle's probes, with what they are judged by.

    Attributes:
        path: of the bundle.
        probe: see Probe; fewer images.
        head_bias: float64 [C].
        allowed: largest |logit difference| to the fp32 model's answers.
    """

    path: Path
    probe: Probe
    head_bias: NDArray[np.float64]
    allowed: float

    @classmethod
    def of(cls, bundle: Bundle, *, n_probes: int = N_STARTUP_PROBES, probe: Probe | None = None) -> "KnownAnswers":
        """Return a bundle's.

        Args:
            bundle: verified.
            n_probes: how many.
            probe: the bundle's, where it was read before; another bundle may lie at its path by now. None reads it.

        Raises:
            BundleError: the probe was changed since the bundle was opened.
        """
        probe = probe or bundle.read_probe()
        # Copies, as they are kept: the rest of the 32 needn't be.
        few = Probe(*(each[:n_probes].copy() for each in (probe.pixels, probe.logits, probe.cam)))
        # Twice, because int8 rounds to another step when fp32 sums differ in the last bit.
        allowed = 2.0 * bundle.manifest.probe_max_abs_logit_error + LOGIT_SLACK
        return cls(bundle.path, few, np.asarray(bundle.manifest.head_bias), allowed)

    def check(self, run: Run) -> float:
        """Run the probes and return the largest |logit difference| to the fp32 model's answers.

        Raises:
            SessionError: the answers differ by more than when the bundle was kept, or maps and logits disagree.
        """
        logits, maps = run(self.probe.pixels)
        if logits.shape != self.probe.logits.shape or maps.shape != self.probe.cam.shape:
            raise SessionError(
                f"{self.path}: the model answers {logits.shape} and {maps.shape}, not as its manifest says."
            )
        error = float(np.abs(logits - self.probe.logits).max())
        if error > self.allowed:
            raise SessionError(
                f"{self.path}: known answers differ by {error:.4f} logits, {self.allowed:.4f} is allowed. "
                f"This backend does not run this model as it was proven; don't use it here. Run: chexnet-deploy doctor"
            )
        from_maps = maps.mean(axis=(2, 3), dtype=np.float64) + self.head_bias
        gap = float((np.abs(from_maps - logits) / np.maximum(1.0, np.abs(logits))).max())
        if gap > CAM_IDENTITY_TOLERANCE:
            raise SessionError(f"{self.path}: maps and logits disagree by {gap:.1e}, 1e-4 is allowed. Export it again.")
        return error
