"""Turn an evaluation into one self-contained HTML page that is readable on paper. Computes nothing that isn't in its record.

The figures are drawn in figures.py.
"""

from pathlib import Path

from chexnet_deploy.evaluation import as_text
from chexnet_deploy.evaluation.localize import BoxedMap, choose_pictures
from chexnet_deploy.evaluation.pages.charts import define_marks, draw_areas
from chexnet_deploy.evaluation.pages.figures import draw_finding, draw_maps, draw_readers, jpeg, png
from chexnet_deploy.evaluation.pages.style import render
from chexnet_deploy.evaluation.records import Evaluation
from chexnet_deploy.evaluation.run import EvaluationRun
from chexnet_deploy.files import write_file

_DPI = 130  # sharp on paper too
_PLACES = {1: ("only",), 2: ("best", "worst"), 3: ("best", "median", "worst")}


def write_html(path: Path, run: EvaluationRun) -> None:
    """Write the page."""
    evaluation = run.evaluation
    readers = evaluation.readers
    short_names = {} if readers is None else as_text.short_names(readers)
    page = render(
        "evaluation.html",
        evaluation=evaluation,
        rows=as_text.summary_rows(evaluation),
        mean=as_text.mean_line(evaluation),
        shorts=[] if readers is None else [as_text.study_line(study) for study in readers.studies],
        missing=as_text.missing_lines(evaluation),
        marks=define_marks(),
        areas=draw_areas(evaluation),
        figures=_draw_findings(evaluation, short_names),
        readers=None if readers is None else as_text.readers_line(readers),
        short_names=short_names,
        differences=None if readers is None else png(draw_readers(readers), dpi=_DPI),
        studies=[]
        if readers is None
        else [(study, as_text.study_rows(study, short_names)) for study in readers.studies],
        protocols=as_text.PROTOCOLS,
        subgroups=as_text.subgroup_tables(evaluation),
        localization=(
            [] if evaluation.localization is None else as_text.localization_rows(evaluation.localization.summary)
        ),
        not_comparable=as_text.NOT_COMPARABLE,
        paper_auroc=as_text.auroc_rows(evaluation),
        paper_f1=as_text.f1_rows(evaluation),
        boxes=None if evaluation.localization is None else as_text.localization_line(evaluation.localization),
        maps=_draw_maps(run.maps),
    )
    write_file(path, page)


def _draw_findings(evaluation: Evaluation, short_names: dict[str, str]) -> list[tuple[str, str]]:
    """Return each finding with its figure; of readers where they were compared on it."""
    rocs = {} if evaluation.readers is None else {roc.finding: roc for roc in evaluation.readers.roc}
    return [
        (row.finding, png(draw_finding(row, rocs.get(row.finding), short_names), dpi=_DPI))
        for row in evaluation.findings
    ]


def _draw_maps(maps: tuple[BoxedMap, ...]) -> list[tuple[str, str]]:
    return [
        (finding, jpeg(draw_maps(chosen, _PLACES[len(chosen)]), dpi=_DPI))
        for finding, chosen in choose_pictures(maps).items()
    ]
