"""What was published, for a table beside ours: Rajpurkar et al. 2017 (arXiv 1711.05225 v3), tables 1 and 2.

Their patients were split at random and the lists never released, and their readers read 420 other images: nothing here can be
compared number by number, and the page says so.
"""

from typing import Final

from chexnet_deploy.evaluation.records import Evaluation

NOT_COMPARABLE: Final = "other split, not comparable"

# Finding -> AUROC of Wang et al. 2017, Yao et al. 2017 and CheXNet, as the paper's table 2 has them.
AUROC: Final = {
    "Atelectasis": (0.716, 0.772, 0.8094),
    "Cardiomegaly": (0.807, 0.904, 0.9248),
    "Effusion": (0.784, 0.859, 0.8638),
    "Infiltration": (0.609, 0.695, 0.7345),
    "Mass": (0.706, 0.792, 0.8676),
    "Nodule": (0.671, 0.717, 0.7802),
    "Pneumonia": (0.633, 0.713, 0.7680),
    "Pneumothorax": (0.806, 0.841, 0.8887),
    "Consolidation": (0.708, 0.788, 0.7901),
    "Edema": (0.835, 0.882, 0.8878),
    "Emphysema": (0.815, 0.829, 0.9371),
    "Fibrosis": (0.769, 0.767, 0.8047),
    "Pleural_Thickening": (0.708, 0.765, 0.8062),
    "Hernia": (0.767, 0.914, 0.9164),
}

# F1 of pneumonia with 95 % intervals, the paper's table 1.
PNEUMONIA_F1: Final = {
    "radiologist 1": (0.383, 0.309, 0.453),
    "radiologist 2": (0.356, 0.282, 0.428),
    "radiologist 3": (0.365, 0.291, 0.435),
    "radiologist 4": (0.442, 0.390, 0.492),
    "mean of radiologists": (0.387, 0.330, 0.442),
    "CheXNet": (0.435, 0.387, 0.481),
}


def auroc_rows(evaluation: Evaluation) -> list[dict[str, str]]:
    """Return the paper's table 2 beside the evaluation's own areas."""
    rows = []
    for row in evaluation.findings:
        if row.finding in AUROC:
            wang, yao, chexnet = AUROC[row.finding]
            rows.append(
                {
                    "finding": row.finding,
                    "here": "undefined" if row.auroc is None else f"{row.auroc:.4f}",
                    "CheXNet": f"{chexnet:.4f}",
                    "Yao et al.": f"{yao:.3f}",
                    "Wang et al.": f"{wang:.3f}",
                }
            )
    return rows


def f1_rows(evaluation: Evaluation) -> list[dict[str, str]]:
    """Return the paper's table 1, where pneumonia was compared with readers here too; else nothing."""
    readers = evaluation.readers
    if readers is None or "Pneumonia" in readers.left_out:
        return []
    return [
        {"rater": name, "F1": f"{f1:.3f} ({low:.3f} to {high:.3f})"} for name, (f1, low, high) in PNEUMONIA_F1.items()
    ]
