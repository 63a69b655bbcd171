"""An evaluation -> its Methods section: what was done, with the numbers that were used, and whom to cite.

Written from the record alone, so that it can't say what was not done.
"""

from typing import Final

from chexnet_deploy.evaluation.records import Evaluation, ReaderComparison
from chexnet_deploy.evaluation.scores import MIN_POSITIVE_PATIENTS
from chexnet_deploy.metrics.f1 import MAX_UNDEFINED_SHARE
from chexnet_deploy.metrics.probabilities import N_BINS
from chexnet_deploy.metrics.roc import N_RESAMPLES, SEED

REFERENCES: Final = {
    "DeLong 1988": "DeLong ER, DeLong DM, Clarke-Pearson DL. Comparing the areas under two or more correlated receiver "
    "operating characteristic curves. Biometrics 1988; 44:837-845.",
    "Sun & Xu 2014": "Sun X, Xu W. Fast implementation of DeLong's algorithm. IEEE Signal Process Lett 2014; "
    "21:1389-1393.",
    "Obuchowski 1997": "Obuchowski NA. Nonparametric analysis of clustered ROC curve data. Biometrics 1997; 53:567-578.",
    "Rao & Scott 1992": "Rao JNK, Scott AJ. A simple method for the analysis of clustered binary data. Biometrics 1992; "
    "48:577-585.",
    "Wilson 1927": "Wilson EB. Probable inference, the law of succession, and statistical inference. J Am Stat Assoc "
    "1927; 22:209-212.",
    "Brier 1950": "Brier GW. Verification of forecasts expressed in terms of probability. Mon Weather Rev 1950; 78:1-3.",
    "Nixon 2019": "Nixon J, Dusenberry MW, Zhang L, Jerfel G, Tran D. Measuring calibration in deep learning. CVPR "
    "Workshops 2019; arXiv 1904.01685.",
    "Rajpurkar 2017": "Rajpurkar P, Irvin J, Zhu K, et al. CheXNet: radiologist-level pneumonia detection on chest "
    "X-rays with deep learning. 2017; arXiv 1711.05225v3.",
    "Nabulsi 2021": "Nabulsi Z, Sellergren A, Jamshy S, et al. Deep learning for distinguishing normal versus abnormal "
    "chest radiographs and generalization to two unseen diseases tuberculosis and COVID-19. Sci Rep 2021; 11:15523.",
    "Wang 2017": "Wang X, Peng Y, Lu L, Lu Z, Bagheri M, Summers RM. ChestX-ray8: hospital-scale chest X-ray database "
    "and benchmarks on weakly-supervised classification and localization of common thorax diseases. CVPR 2017; "
    "2097-2106.",
    "Zhang 2018": "Zhang J, Bargal SA, Lin Z, Brandt J, Shen X, Sclaroff S. Top-down neural attention by excitation "
    "backprop. Int J Comput Vis 2018; 126:1084-1102.",
}


def describe_methods(evaluation: Evaluation) -> tuple[str, ...]:
    """Return the paragraphs, and after them one line for each work cited."""
    paragraphs = [_areas(evaluation), _other_figures(evaluation), _subgroups()]
    if evaluation.readers is not None:
        paragraphs.append(_readers(evaluation.readers))
    if evaluation.localization is not None:
        paragraphs.append(_localization(evaluation))
    text = " ".join(paragraphs)
    return (*paragraphs, *(f"[{key}] {work}" for key, work in REFERENCES.items() if key in text))


def _areas(evaluation: Evaluation) -> str:
    mean = (
        f"The mean is the unweighted one over the {evaluation.n_counted} of {len(evaluation.findings)} findings whose "
        f"AUROC is defined; its interval has the covariance between findings through shared patients."
    )
    return (
        f"Scores of {evaluation.n_images:,} images of {evaluation.n_patients:,} patients were compared with labels, "
        f"one finding at a time; every label was taken as it stands (ChestX-ray14's are mined from reports [Wang "
        f"2017]). AUROC counts a tie one half. Its variance is DeLong's [DeLong 1988], computed by ranks [Sun & Xu "
        f"2014] and clustered by patient [Obuchowski 1997], as images of one patient are alike; the 95 % interval is "
        f"one of Student's t on the logit scale, or Wilson's [Wilson 1927] where the variance is zero. {mean} The band "
        f"round each ROC curve is pointwise: 2.5 and 97.5 percentiles of the sensitivity at each false-positive rate "
        f"over {N_RESAMPLES} resamples of patients with replacement, seed {SEED}."
    )


def _other_figures(evaluation: Evaluation) -> str:
    text = "AUPRC is the average precision, without interpolation. "
    if evaluation.kind == "score":
        text += "Brier score and calibration error are not given: the scores are not probabilities. "
    else:
        if evaluation.kind == "logit":
            text += "Probabilities are the sigmoid of the logits, in float32. "
        text += (
            f"The Brier score is the mean squared difference of probability and label [Brier 1950]; the expected "
            f"calibration error (ECE) is that of {N_BINS} bins of about equally many images [Nixon 2019], which are "
            f"the points of the reliability diagrams. "
        )
    text += "AUPRC, Brier score and ECE are points without intervals."
    if evaluation.thresholds_from is not None:
        text += (
            f" Sensitivity and specificity are at given thresholds, at and above which a finding is called: "
            f"{evaluation.thresholds_from}. Their 95 % intervals are Wilson's [Wilson 1927] at the effective number "
            f"of images [Rao & Scott 1992]."
        )
    return text


def _subgroups() -> str:
    return (
        f"Subgroups are of sex, age in years and view as the labels state them. An AUROC is given where at least "
        f"{MIN_POSITIVE_PATIENTS} patients have the finding and {MIN_POSITIVE_PATIENTS} have an image without it. Many "
        f"groups are looked at: about one interval in twenty misses its true value by chance alone."
    )


def _readers(readers: ReaderComparison) -> str:
    first = readers.studies[0]
    return (
        f"Radiologists' reads are the public five-reader labels of {readers.n_read} images [Nabulsi 2021]; "
        f"{readers.n_images} of these images, of {readers.n_patients} patients, have scores too, and the studies are "
        f"of them alone. The model's thresholds are {readers.thresholds_from}. F1 is computed by three protocols: each "
        f"rater, the model among them, against each of the others, images resampled [Rajpurkar 2017]; each reader "
        f"against the other readers and the model against all of them, patients resampled; and, on the majority label "
        f"of readers {', '.join(readers.majority_readers)}, the readers who had no vote and the model, patients "
        f"resampled. Intervals are 2.5 and 97.5 percentiles of {first.n_resamples:,} resamples, seed {first.seed}. An "
        f"F1 is undefined where neither rater nor label calls an image positive; where that holds of more than "
        f"{MAX_UNDEFINED_SHARE:.0%} of the resamples no interval is given and the finding is not in the mean. Points "
        f"in the ROC plane are the readers who had no vote, and the model at its threshold, against that majority."
    )


def _localization(evaluation: Evaluation) -> str:
    assert evaluation.localization is not None
    of, summary = evaluation.localization, evaluation.localization.summary
    smaller = f" ({of.n_left_out} others are smaller than the boxes' images, and left out)" if of.n_left_out else ""
    return (
        f"Class activation maps of {of.n_images} evaluated images with boxes, {of.width_px} x {of.height_px} px"
        f"{smaller}, were scored against the boxes of their finding [Wang 2017], whatever the probability: stretched "
        f"bilinearly over the image, cut at {summary.map_threshold:.3f} of each map's own range, a box drawn round each "
        f"region; IoU, and intersection over the detected box (IoBB), are each true box's best. The pointing game counts "
        f"a hit where the map's maximum lies within {summary.tolerance_px:.3g} px of a box [Zhang 2018]. The cut was "
        f"fixed beforehand."
    )
