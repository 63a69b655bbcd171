"""Which convolutions int8 hurts most, and the fewest that must stay in floating point for a gate to pass."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from chexnet_deploy.export.quantize.variants import Prepared
from chexnet_deploy.images.preprocessing import Pixels
from chexnet_deploy.runtime.sessions.base import Logits, run_in_batches
from chexnet_deploy.runtime.sessions.ort import OrtSession


@dataclass(frozen=True, slots=True)
class Sensitivity:
    """What one convolution in int8 does to the logits when all others stay in floating point.

    Attributes:
        convolution: its ONNX node name.
        logit_noise: RMS logit difference over images and findings, as a share of the logits' standard deviation.
    """

    convolution: str
    logit_noise: float


def measure_sensitivity(
    prepared: Prepared, pixels: Pixels, *, on_layer: Callable[[int], None] | None = None
) -> tuple[Sensitivity, ...]:
    """Quantise one convolution at a time and compare with all left in floating point; the most sensitive first.

    Concats of the cpu form stay integers in both, so what is measured is the convolution's own part.

    Args:
        prepared: the int8 form.
        pixels: uint8 [N, 1, S, S]; a few calibration images are enough.
        on_layer: called with the convolutions done.
    """
    names = tuple(prepared.convs)
    reference = _answer(prepared, names, pixels)
    # One spread for all findings: a flat finding would make every layer look bad.
    spread = float(np.sqrt(np.mean(np.var(reference, axis=0, dtype=np.float64)))) or 1.0
    measured = []
    for done, name in enumerate(names, start=1):
        logits = _answer(prepared, [other for other in names if other != name], pixels)
        noise = float(np.sqrt(np.mean((logits.astype(np.float64) - reference) ** 2))) / spread
        measured.append(Sensitivity(name, noise))
        if on_layer is not None:
            on_layer(done)
    return tuple(sorted(measured, key=lambda each: -each.logit_noise))


def fewest_float_convolutions(
    ranking: Sequence[str], passes: Callable[[Sequence[str]], bool], *, at_most: int
) -> tuple[str, ...] | None:
    """Return the shortest beginning of the ranking that passes when left in floating point; None where `at_most` don't.

    Tries 1, 2, 4 … and then halves the gap, so `passes` is asked about 2 log2(at_most) times.

    Args:
        ranking: convolutions, the most sensitive first.
        passes: whether the gate passes with these in floating point; more of them must not make it fail.
        at_most: how many may be given up.
    """
    failed, trial = 0, 1
    while not passes(ranking[:trial]):
        if trial >= min(at_most, len(ranking)):
            return None
        failed, trial = trial, min(2 * trial, at_most, len(ranking))
    while trial - failed > 1:
        middle = (failed + trial) // 2
        if passes(ranking[:middle]):
            trial = middle
        else:
            failed = middle
    return tuple(ranking[:trial])


def _answer(prepared: Prepared, float_convs: Sequence[str], pixels: Pixels) -> Logits:
    session = OrtSession(prepared.build(float_convs).SerializeToString(), pixels.shape[-1])
    logits: NDArray[np.float32] = run_in_batches(session, pixels)[0]
    session.close()
    return logits
