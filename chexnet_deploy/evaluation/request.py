"""What a user asked to have evaluated, checked before any work is done."""

from dataclasses import dataclass
from pathlib import Path

from chexnet_deploy.bundle.signing.trust import Trust
from chexnet_deploy.datasets.chestxray14 import Split
from chexnet_deploy.errors import SpecError
from chexnet_deploy.runtime.sessions.base import Provider


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationRequest:
    """Scores of an engine or of a CSV, on whose images, and what beside AUROC.

    Attributes:
        engine: to run, a bundle, an ONNX file or an endpoint; or None, and `predictions` is given.
        contract: of an engine that is no bundle.
        predictions: CSV as predictions.read_predictions takes it.
        labels: table for the predictions; None takes that of `data`.
        data: as open_data takes it; with predictions its split and its table alone are used.
        split: whose images; None is test for an engine, and every predicted image for predictions.
        images: list that narrows the images further.
        readers: folder of expert labels.
        thresholds: JSON object, finding -> probability.
        has_localization: score activation maps against boxes.
        threads: of an engine's session; None takes all cores.
        provider: of an engine's session.
        trust: what a bundle must show to be opened.

    Raises:
        SpecError: the options contradict each other or something is missing.
    """

    engine: Path | str | None = None
    contract: Path | None = None
    predictions: Path | None = None
    labels: Path | None = None
    data: Path | None = None
    split: Split | None = None
    images: Path | None = None
    readers: Path | None = None
    thresholds: Path | None = None
    has_localization: bool = False
    threads: int | None = None
    provider: Provider = "auto"
    trust: Trust | None = None

    def __post_init__(self) -> None:
        if (self.engine is None) == (self.predictions is None):
            found = "neither an engine nor predictions" if self.engine is None else "both an engine and predictions"
            raise SpecError(
                f"found {found}; needed one of them. Give a bundle, an ONNX file or an endpoint and --data ROOT, "
                f"or --predictions CSV and --labels CSV."
            )
        for is_wrong, message in self._contradictions():
            if is_wrong:
                raise SpecError(message)

    def _contradictions(self) -> tuple[tuple[bool, str], ...]:
        runs = self.engine is not None
        return (
            (
                runs and self.labels is not None,
                "--labels belongs to --predictions; an engine's labels come with the images. Give --data ROOT alone.",
            ),
            (
                runs and self.data is None,
                "an engine is evaluated on labelled images. Give them by --data ROOT.",
            ),
            (
                not runs and self.labels is None and self.data is None,
                "predictions need labels. Give --labels CSV, or --data ROOT for the table in it.",
            ),
            (
                not runs and self.contract is not None,
                "--contract says what an engine takes and answers, and predictions run nothing. Omit it.",
            ),
            (
                not runs and self.has_localization,
                "--localization needs activation maps, and a CSV has none. Give a bundle and --data ROOT instead.",
            ),
            (
                not runs and (self.threads is not None or self.provider != "auto"),
                "--threads and --provider say how an engine runs, and predictions run nothing. Omit them.",
            ),
            (
                not runs and self.trust is not None,
                "--trust says which bundles may run, and predictions run nothing. Omit it.",
            ),
            (
                self.readers is not None and self.split in ("train", "val"),
                "readers read images of the official test list alone. Leave --split away, or give --split test.",
            ),
            (
                not runs and self.split is not None and self.data is None,
                "--split needs a split. Give labelled images by --data, or omit it.",
            ),
            (
                not runs and self.readers is not None and self.thresholds is None and self.data is None,
                "readers say yes or no, so the model needs thresholds, and they must not be chosen on test patients. "
                "Give the official lists by --data ROOT, or thresholds by --thresholds FILE.",
            ),
        )
