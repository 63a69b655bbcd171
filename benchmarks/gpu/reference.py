"""What rows are judged by: the images' pixels, their labels, and the fp32 model's answers in ONNX Runtime on the CPU.

Pixels and answers are made once and kept in the work folder.
"""

import io
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from chexnet_deploy.bundle.bundle import Bundle
from chexnet_deploy.datasets import ChestXray14, LabelledImages
from chexnet_deploy.errors import ChexnetError
from chexnet_deploy.evaluation.parity import compare
from chexnet_deploy.evaluation.spec import read_spec
from chexnet_deploy.files import sha256_hex, sha256_of_file, write_file
from chexnet_deploy.images.preprocessing import Pixels
from chexnet_deploy.runtime.score import iter_pixels
from chexnet_deploy.runtime.sessions.base import Logits, run_in_batches, sigmoid
from chexnet_deploy.runtime.sessions.open import open_session


class Reference:
    """Reads no image and runs no model before a row needs it.

    Args:
        fp32: the reference's bundle.
        data: labelled images.
        n_images: how many of them, at the most.
        more: uint8 [N, 1, S, S] .npy without labels, or None.
        work: the folder that is kept between calls.

    Attributes:
        images_id: hash of what the images are.
        pixels_path: where `prepare` puts the pixels.
    """

    def __init__(self, fp32: Bundle, data: Path, n_images: int, more: Path | None, work: Path) -> None:
        dataset = ChestXray14.open(data)
        # Test patients first; training patients serve parity of one model with another as well.
        radiographs = [radiograph for name in ("test", "val", "train") for radiograph in dataset.split(name)]
        self.labelled = LabelledImages.of(radiographs[:n_images], fp32.manifest.findings)
        self._fp32, self._more = fp32, more
        names = "".join(f"{name}\n" for name in self.labelled.names)
        self.images_id = sha256_hex(f"{names}{'' if more is None else sha256_of_file(more)}".encode())
        self.n_more = 0 if more is None else len(np.load(more, mmap_mode="r"))
        self.pixels_path = work / f"pixels-{self.images_id[:12]}.npy"
        self._answers_path = work / f"reference-{self.images_id[:12]}-{fp32.id[:12]}.npy"

    def prepare(self) -> None:
        """Write pixels and answers where they are not there yet; one killed meanwhile leaves none."""
        if not self.pixels_path.exists():
            pixels = np.concatenate(list(iter_pixels(self.labelled.paths, self._fp32.manifest.preprocessing)))
            _save(self.pixels_path, pixels if self._more is None else np.concatenate([pixels, np.load(self._more)]))
        if not self._answers_path.exists():
            session = open_session(self._fp32, provider="cpu")
            _save(self._answers_path, run_in_batches(session, np.load(self.pixels_path))[0])
            session.close()

    @cached_property
    def _wanted(self) -> Logits:
        answers: Logits = np.load(self._answers_path)
        return answers

    def judge(self, folder: Path, bundle: Bundle, spec: str) -> dict[str, Any]:
        """Return the parity of a row's logits by a spec's gate: with labels, and in numbers alone on the images without."""
        try:
            got = np.load(folder / "logits.npy")
        except OSError:
            return {"error": "it wrote no logits, so nothing is known of its answers"}
        n, manifest, labelled = len(self.labelled.paths), bundle.manifest, self.labelled
        try:
            gate, points = read_spec(spec).gate, manifest.operating_points
            truth, patients, findings = labelled.truth, labelled.patients, manifest.findings
            report = compare(self._wanted[:n], got[:n], truth, patients, findings, points, gate)
        except ChexnetError as err:
            return {"error": str(err)}
        judged: dict[str, Any] = {
            "summary": report.summary,
            "verdict": report.verdict,
            "reasons": report.reasons,
            "mean_auroc": report.mean_auroc_candidate,
            "max_abs_probability_difference": report.max_abs_probability_difference,
            "n_flips": report.n_flips,
        }
        if self.n_more:
            judged["more_images"] = _differences(self._wanted[n:], got[n:])
        return judged


def _save(path: Path, array: Pixels | Logits) -> None:
    content = io.BytesIO()
    np.save(content, array)
    write_file(path, content.getvalue())


def _differences(wanted: Logits, got: Logits) -> dict[str, float]:
    gap = np.abs(sigmoid(wanted) - sigmoid(got))
    return {
        "max_abs_logit_difference": float(np.abs(wanted - got).max()),
        "max_abs_probability_difference": float(gap.max()),
        "p999_abs_probability_difference": float(np.quantile(gap, 0.999, method="higher")),
    }
