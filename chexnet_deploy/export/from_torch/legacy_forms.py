"""What circulating CheXNet files don't say of themselves: the order of their findings, and how images were prepared.

Facts alone, each with where it was read; import_legacy.py converts by them. A file's origin is for its user to name.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final, Literal

from chexnet_deploy.datasets.findings import FINDINGS
from chexnet_deploy.images.preprocessing import Preprocessing


@dataclass(frozen=True, slots=True)
class LegacyForm:
    """What files of one origin don't say of themselves.

    Attributes:
        findings: the outputs, in order.
        preprocessing: what comes nearest to the published one.
        notes: where it is not the published one, and what else to know before a result is believed.
        input: gray is one channel in -1024..1024; rgb is three, normalised as `preprocessing` says.
    """

    findings: tuple[str, ...]
    preprocessing: Preprocessing
    notes: tuple[str, ...]
    input: Literal["rgb", "gray"] = "rgb"


_TEN_CROPS = (
    "not the published evaluation: that resized the shorter side to 256 and averaged the probabilities of ten 224 px "
    "crops; here the whole picture is squashed to 224 x 224 and read once"
)
_ARNOWENG_LISTS = (
    "trained on arnoweng's training list, which holds 17,920 of the 25,596 images of the official test list: "
    "a result on the official test split means nothing"
)
FORMS: Final[Mapping[str, LegacyForm]] = MappingProxyType(
    {
        # github.com/arnoweng/CheXNet, model.py: CLASS_NAMES, Resize(256), TenCrop(224), Sequential(Linear, Sigmoid)
        "arnoweng": LegacyForm(FINDINGS, Preprocessing(), (_TEN_CROPS, _ARNOWENG_LISTS)),
        # github.com/zoogzog/chexnet, ChexnetTrainer.py (the same names and crops), README.md (whose lists), issue 11 (keys)
        "zoogzog": LegacyForm(
            FINDINGS,
            Preprocessing(),
            (_TEN_CROPS, _ARNOWENG_LISTS, "trained on random crops of 8 to 100 % of a picture, not on whole ones"),
        ),
        # github.com/jrzech/reproduce-chexnet, cxr_dataset.py (PRED_LABEL), model.py (Scale(224), CenterCrop(224))
        "jrzech": LegacyForm(
            FINDINGS,
            Preprocessing(),
            (
                "the published preprocessing for square pictures, as all of ChestX-ray14 are; others it cropped to the "
                "middle square, and here they are squashed",
                "trained on its own split: of the official test patients with even numbers, 1,100 of 1,391 are not in its test "
                "list, so a result on the official test split means nothing",
            ),
        ),
        # github.com/mlmed/torchxrayvision, datasets.py (default_pathologies, normalize), models.py (DenseNet, op_norm, "all")
        "torchxrayvision-all": LegacyForm(
            (
                *("Atelectasis", "Consolidation", "Infiltration", "Pneumothorax", "Edema", "Emphysema", "Fibrosis"),
                *("Effusion", "Pneumonia", "Pleural_Thickening", "Cardiomegaly", "Nodule", "Mass", "Hernia"),
                *("Lung Lesion", "Fracture", "Lung Opacity", "Enlarged Cardiomediastinum"),
            ),
            Preprocessing(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)),
            (
                "not the published evaluation: that cropped the middle square and resized with another filter; here "
                "the whole picture is squashed to 224 x 224",
                "probabilities are plain sigmoids: the published model rescales them by its operating points",
                "trained on ChestX-ray14 among other sets, on its own split",
            ),
            input="gray",
        ),
    }
)
